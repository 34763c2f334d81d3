"""Where data comes from: digits, files, folders, noise, and the user's own objects."""

from autocomp.data.load import load_data, of_pixels
from autocomp.data.objects import splits_from_objects
from autocomp.data.splits import Batch, DataOptions, Indexed, Split, Splits

__all__ = ["Batch", "DataOptions", "Indexed", "Split", "Splits", "load_data", "of_pixels", "splits_from_objects"]
