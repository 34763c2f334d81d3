"""From the name of a data source to its splits."""

from pathlib import Path

from autocomp.data.arrays import load_cifar10, load_digits, load_npz
from autocomp.data.folder import load_folder
from autocomp.data.noise import load_noise
from autocomp.data.objects import splits_from_objects
from autocomp.data.splits import DataOptions, Splits
from autocomp.errors import DataError
from autocomp.factory import call_factory, is_factory

__all__ = ["load_data", "of_pixels"]

HINT = "write digits, npz:FILE, imagefolder:DIR, cifar10:DIR, random:3x224x224, or package.module:factory"
FROM_DISK = {"npz": load_npz, "imagefolder": load_folder, "cifar10": load_cifar10}


def of_pixels(spec: str) -> bool:
    """Whether a source holds pixels, which are normalised here; noise and datasets of one's own come ready."""
    return spec == "digits" or spec.partition(":")[0] in FROM_DISK


def load_data(spec: str, options: DataOptions) -> Splits:
    """Open a source and split it.

    Pixels in [0, 1] are normalised with ``options.mean`` and ``options.std``, else with the source's default:
    ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225), also for CIFAR-10; for images of one channel their
    means; for ``digits`` 0.3 and 0.33. Images of ``imagefolder:`` become 224x224; others keep their size.

    Args:
        spec: one of

            - ``digits``: the embedded handwritten digits, 3x32x32, in fixed splits;
            - ``npz:FILE``: ``x_train y_train x_test y_test``, uint8 images (n, h, w, c);
            - ``imagefolder:DIR``: ``DIR/{train,val,test}/CLASS/*``, or ``DIR/CLASS/*``;
            - ``cifar10:DIR``: CIFAR-10 for Python, unpacked;
            - ``random:CxHxW`` or ``random:CxHxWxCLASSES``: noise, for latency;
            - ``package.module:factory``: a function without arguments that returns what `splits_from_objects` takes.

    Raises:
        DataError: the source is unknown, missing, malformed or too small.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return load_digits(options)
    if kind in FROM_DISK and rest:
        return FROM_DISK[kind](Path(rest).expanduser(), options)
    if kind == "random":
        return load_noise(rest, options)
    if kind in FROM_DISK or not is_factory(spec):
        raise DataError(f"unknown data {spec!r}: {HINT}")
    return splits_from_objects(call_factory(spec, DataError, HINT), options, source=spec)
