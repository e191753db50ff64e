"""The pool: all images, packed once, read-only, addressed by `sample_index`."""

from distal.pool.images import Pool

__all__ = ["Pool"]
