"""The shapes of images, videos and sounds that a model takes, as its configuration states them."""

import math

from transformers import PretrainedConfig


# The height and the width of an image for a model that takes any size.
ANY_SIZE = 64


# The number of steps of the shortest sound that is stated in samples.
SHORTEST = 4


def find_media_shape(name: str, ndim: int, config: PretrainedConfig, length: int) -> tuple[int, ...] | None:
    """Return the shape of a row's value in column `name`; `None` where the configuration does not say it.

    Args:
        name: the column's name, as the model's forward has it.
        ndim: the number of dimensions of a value.
        config: the model's configuration.
        length: how long a sound is: in samples, or in steps of the model if the model could not hear so few samples.

    >>> from transformers import ViTConfig, Wav2Vec2Config
    >>> find_media_shape("pixel_values", 3, ViTConfig(image_size=32), 11)
    (3, 32, 32)
    >>> find_media_shape("input_values", 1, Wav2Vec2Config(), 11)
    (4160,)
    """
    finders = {"pixel_values": _find_image, "input_values": _find_wave, "input_features": _find_spectrogram}
    shape = finders[name](config, length) if name in finders else None
    return shape if shape is not None and len(shape) == ndim else None


def _find_image(config: PretrainedConfig, length: int) -> tuple[int, ...] | None:
    parts = (config, getattr(config, "vision_config", None), getattr(config, "encoder", None))
    seeing = next((part for part in parts if getattr(part, "num_channels", None) is not None), None)
    if seeing is None:
        return None
    size = getattr(seeing, "image_size", None) or ANY_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    image = (seeing.num_channels, height, width)
    frames = getattr(seeing, "num_frames", None)
    return image if frames is None else (frames, *image)


def _find_wave(config: PretrainedConfig, length: int) -> tuple[int, ...] | None:
    strides = getattr(config, "conv_stride", None)
    if strides is None:
        return _find_spectrogram(config, length)
    step = math.prod(strides)
    # A length of fewer steps is one in steps; and there are two more, because the first needs more samples.
    return (length if length >= SHORTEST * step else step * (length + 2),)


def _find_spectrogram(config: PretrainedConfig, length: int) -> tuple[int, ...] | None:
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None and getattr(config, "max_source_positions", None) is not None:
        return bins, 2 * config.max_source_positions  # Whisper, which takes sounds of one length.
    if bins is not None and getattr(config, "max_length", None) is not None:
        return config.max_length, bins
    for width in ("input_feat_per_channel", "feature_projection_input_dim"):
        if getattr(config, width, None) is not None:
            return 8 * length, getattr(config, width)
    return None
