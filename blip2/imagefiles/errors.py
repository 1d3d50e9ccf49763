"""The error of everything about images."""


class ImageError(ValueError):
    """An image that cannot be read, or settings for images that cannot be followed."""
