"""Labelled images by name, with random access, and deterministic batches of them.

``load`` returns a ``Dataset``, as do ``from_arrays`` and ``from_folder`` of your own images, and ``batches`` iterates
over it.
"""

from robustjax.data._arrays import from_arrays as from_arrays
from robustjax.data._batches import BatchIterator as BatchIterator
from robustjax.data._batches import batches as batches
from robustjax.data._conventions import ChannelStatistics as ChannelStatistics
from robustjax.data._conventions import Splits as Splits
from robustjax.data._conventions import channel_statistics as channel_statistics
from robustjax.data._conventions import splits as splits
from robustjax.data._dataset import Dataset as Dataset
from robustjax.data._folder import from_folder as from_folder
from robustjax.data._load import load as load
from robustjax.data._outliers import with_outliers as with_outliers
from robustjax.data._views import match_images as match_images
from robustjax.data._views import permute_pixels as permute_pixels
from robustjax.data._views import select_classes as select_classes
from robustjax.data._views import synthetic as synthetic
