"""Any frames of a clip straight from its pictures or its video, for what the cache does not hold."""

import os
from collections import OrderedDict
from pathlib import Path

from tracknet.data.decode import Frame, read_picture
from tracknet.data.index import Clip
from tracknet.data.seek import VideoReader

VIDEOS_OPEN = 4  # decoders that a process keeps, some 30 MB each


class SourceFrames:
    """Reads windows of clips from their sources. Keeps a few videos open; a forked process opens its own."""

    def __init__(self) -> None:
        self._videos: OrderedDict[Path, VideoReader] = OrderedDict()
        self._pid = os.getpid()

    def __reduce__(self) -> "tuple[type[SourceFrames], tuple[()]]":
        return SourceFrames, ()

    def read(self, clip: Clip, size_wh: tuple[int, int], first: int, count: int) -> list[Frame]:
        """Frames `first` to `first + count - 1`, each (H, W, 3) uint8, RGB, resized to `size_wh`.

        Raises:
            DataError: a picture or the video is broken, see `decode_clip`.
        """
        if clip.frame_names is not None:
            return [read_picture(clip.source / name, clip.size_wh, size_wh) for name in clip.frame_names[first : first + count]]
        return self._video(clip, size_wh).read(first, count)

    def _video(self, clip: Clip, size_wh: tuple[int, int]) -> VideoReader:
        if self._pid != os.getpid():
            self._pid, self._videos = os.getpid(), OrderedDict()
        if clip.source not in self._videos:
            self._videos[clip.source] = VideoReader(clip.source, clip.length, clip.size_wh, size_wh)
            if len(self._videos) > VIDEOS_OPEN:
                self._videos.popitem(last=False)[1].close()
        self._videos.move_to_end(clip.source)
        return self._videos[clip.source]
