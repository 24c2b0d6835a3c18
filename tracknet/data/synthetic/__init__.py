"""The embedded demo: drawn rallies with exact labels, in the TrackNet layout."""

from tracknet.data.synthetic.writing import make_rallies

__all__ = ["make_rallies"]
