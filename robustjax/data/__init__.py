"""Labelled images by name, with random access, and deterministic batches of them."""

from robustjax.data._batches import BatchIterator as BatchIterator
from robustjax.data._batches import batches as batches
from robustjax.data._conventions import ChannelStatistics as ChannelStatistics
from robustjax.data._conventions import Splits as Splits
from robustjax.data._conventions import channel_statistics as channel_statistics
from robustjax.data._conventions import splits as splits
from robustjax.data._dataset import Dataset as Dataset
from robustjax.data._load import load as load
