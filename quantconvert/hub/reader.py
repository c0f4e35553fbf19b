"""Files of a repository on the Hub, by HTTP ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from quantconvert.checkpoint import RepoFile
from quantconvert.checkpoint.ranges import RemoteReader, Take, Version, Wrong
from quantconvert.errors import CheckpointError
from quantconvert.hub.retry import LATER, answered, may_pass, reason_of, retried

if TYPE_CHECKING:
    from httpx2 import Response

# A wrong answer may be that of one proxy of many.
WRONG_WAITS = (0.5, 0.5)
_NOT_LET_IN = (401, 403)
_LOGIN = "for a private or gated model run `hf auth login`, and accept its terms on its page"


class HubReader(RemoteReader):
    """One file of a repository at one commit; an answer that is not the range asked for is asked for again, then
    refused.

    locations: where files of the repository were found to lie, for all of its readers.
    """

    def __init__(self, repo_id: str, commit: str, file: RepoFile, locations: dict[str, str] | None = None) -> None:
        self.repo_id, self.commit, self.file = repo_id, commit, file
        self._locations = {} if locations is None else locations

    def fetch(self, offset: int, nbytes: int, take: Take) -> None:
        """The same; what broke off is continued where it did."""
        done, complaints = 0, list[BaseException]()

        def go_on() -> None:
            """Fetch what is missing yet."""
            nonlocal done
            for data in self._parts(offset + done, nbytes - done):
                try:
                    take(data, offset + done)
                except BaseException as error:
                    complaints.append(error)
                    raise
                done += len(data)

        def come() -> int:
            return done

        def passes(error: Exception) -> bool:
            return error not in complaints and may_pass(error)

        def is_wrong(error: Exception) -> bool:
            return isinstance(error, Wrong)

        if not nbytes:
            return
        try:
            retried(lambda: retried(go_on, is_wrong, WRONG_WAITS, come), passes, progress=come)
        except CheckpointError:
            raise
        except Exception as error:  # whatever the layers below raise
            if error in complaints:
                raise
            hint = LATER if may_pass(error) else _LOGIN if answered(error) in _NOT_LET_IN else None
            raise CheckpointError(
                f"cannot read `{self.file.path}` of `{self.repo_id}`: {reason_of(error)}", hint=hint
            ) from error

    def _parts(self, offset: int, nbytes: int) -> Iterator[bytes]:
        """The range as it comes; raises `Wrong` where that is not all of it, or more."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        last, done = offset + nbytes - 1, 0
        with self._answer(offset, last) as answer:
            if answer.status_code in _NOT_LET_IN and answer.history:  # the Hub did let us in, the location does not
                raise self._wrong(offset, last, f"status {answer.status_code}")
            hf_raise_for_status(answer)
            self._check(answer, offset, nbytes)
            for part in answer.iter_raw():
                if done + len(part) > nbytes:
                    raise self._wrong(offset, last, "more")
                yield part
                done += len(part)
        if done < nbytes:
            raise self._wrong(offset, last, f"{done} bytes")

    def _answer(self, offset: int, last: int) -> AbstractContextManager[Response]:
        """The answer to a request at the signed location that is known, else at the Hub.

        No token goes to the location: huggingface_hub's client drops it on the way to another origin, and so do we.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        known = self._locations.get(self.file.path)
        url = known or hf_hub_url(self.repo_id, self.file.path, revision=self.commit)
        headers = build_hf_headers(token=False if known else None)
        headers |= {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        asked = get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
        return _Renewed(asked, lambda: self._renewed(offset, last)) if known else asked

    def _renewed(self, offset: int, last: int) -> AbstractContextManager[Response]:
        """The same where the location does not let us in any more."""
        self._locations.pop(self.file.path, None)
        return self._answer(offset, last)

    def _check(self, answer: Response, offset: int, nbytes: int) -> None:
        """That the answer is of the range, of a file of this size, of the content that the commit has."""
        last = offset + nbytes - 1
        whole = answer.status_code == 200 and (offset, nbytes) == (0, self.file.nbytes)
        said = answer.headers.get("Content-Range", "the whole file")
        if not whole and not (answer.status_code == 206 and said == f"bytes {offset}-{last}/{self.file.nbytes}"):
            raise self._wrong(offset, last, f"`{said}`")
        history, expected = answer.history, self.file.sha256
        found = next((tag for past in (*history, answer) if (tag := _etag(past, bool(history)))), None)
        if expected and found and found != expected:
            raise self._wrong(offset, last, f"a file whose ETag is {found} where the commit has {expected}")
        if history and _origin(history[0]) != _origin(answer):
            self._locations[self.file.path] = str(answer.url)

    def _wrong(self, offset: int, last: int, found: str) -> Wrong:
        where = f"`{self.file.path}` of `{self.repo_id}`"
        return Wrong(f"cannot read {where}: asked for bytes {offset}-{last}, the Hub or a proxy before it sent {found}")

    def version(self) -> Version:
        return self.file.version or Version(self.file.nbytes)


def _origin(answer: Response) -> tuple[str, str, int | None]:
    return answer.url.scheme, answer.url.host, answer.url.port


def _etag(answer: Response, linked: bool) -> str | None:
    """The checksum that the Hub gives with an answer: of a large file it is in the one that leads elsewhere."""
    text: str | None = answer.headers.get("X-Linked-Etag") or (None if linked else answer.headers.get("ETag"))
    return text.removeprefix("W/").strip('"') if text else None


class _Renewed:
    """An answer from a known location, or, where that is 401 or 403, the one that `again` gives."""

    def __init__(
        self, asked: AbstractContextManager[Response], again: Callable[[], AbstractContextManager[Response]]
    ) -> None:
        self._asked, self._again = asked, again

    def __enter__(self) -> Response:
        answer = self._asked.__enter__()
        if answer.status_code in _NOT_LET_IN:
            self._asked.__exit__(None, None, None)
            self._asked = self._again()
            return self._asked.__enter__()
        return answer

    def __exit__(self, *error: object) -> None:
        self._asked.__exit__(*error)  # type: ignore[arg-type]
