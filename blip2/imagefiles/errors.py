"""The errors of everything about images."""


class ImageError(ValueError):
    """An image that cannot be read, or settings for images that cannot be followed."""


class FinalImageError(ImageError):
    """An image that no other way of reading its file would show: beyond a limit, or truncated."""
