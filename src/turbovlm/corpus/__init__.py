"""A corpus of images to embeddings, labels or captions in Parquet, by a model that may be accelerated.

`shards` says what there is, `reading` reads and decodes it, `encoder` turns batches into columns, `folder` is what has
been written, and `embed` runs all of it: in this process, or on an engine of `turbovlm.engines`.
"""

from turbovlm.corpus.embed import Summary, embed
from turbovlm.corpus.job import Job

__all__ = ["Job", "Summary", "embed"]
