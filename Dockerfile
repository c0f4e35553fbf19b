# docker build -t quantconvert .
# docker run --rm -v "$PWD:/work" -v hf:/hf -e HF_TOKEN quantconvert org/model out --bits 4
FROM python:3.11-slim

# A C compiler for the kernel, while it is installed; CPU builds of torch, as others are gigabytes.
COPY . /src
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend cpu -c /src/constraints.txt /src \
    && pip uninstall -y uv \
    && apt-get purge -y --auto-remove gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /src \
    && useradd --create-home --uid 1000 user \
    && install -d -o user /work /hf

USER user
WORKDIR /work
ENV HF_HOME=/hf
VOLUME /hf
ENTRYPOINT ["quantconvert"]
