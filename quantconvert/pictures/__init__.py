"""What a result's quantconvert.json says, for people: a page, a picture, Markdown. No weight is read."""
