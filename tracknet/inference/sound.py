"""Carries a video's sound over into another file."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import av

from tracknet.data.decode import BROKEN_VIDEO
from tracknet.inference.decoding import open_container, packets_to_the_end
from tracknet.inference.video_times import JoinedClock

COPIED = ("aac", "mp3", "opus", "flac")  # that an mp4 can hold and browsers play
LOWEST_RATE_OF_MP3 = 16000  # samples per second, in an mp4
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_RATE_ELSE = 48000
LEAD_IN_S = 0.2  # that decoders need before the sound is right; an mp4 says that it is not to be heard


def sound_streams(container: "av.container.InputContainer") -> "list[av.AudioStream]":
    """The sound tracks that FFmpeg knows how to decode."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


class SoundTrack:
    """The first sound track of a file, written into an mp4 bit by bit, so that neither sound nor pictures run ahead.

    Sound that an mp4 can hold is copied; other sound becomes AAC, in stereo where it had more channels. What is heard before the
    first picture and what is damaged is left out. To be used in a `with` block.

    Args:
        path: file to read from; it has sound.
        start_s: time on the file's clock at which the output begins.
        output: where the sound goes; gets a stream.
    """

    def __init__(self, path: Path, start_s: float, output: "av.container.OutputContainer") -> None:
        self._output, self._start_s = output, start_s
        self._container = open_container(path)
        self._source = sound_streams(self._container)[0]
        context = self._source.codec_context
        name = context.codec.canonical_name
        copied = name in COPIED and (name != "mp3" or context.sample_rate >= LOWEST_RATE_OF_MP3)
        if copied:
            self._target = output.add_stream_from_template(self._source)
        else:
            rate = context.sample_rate if context.sample_rate in AAC_RATES else AAC_RATE_ELSE
            self._target = output.add_stream("aac", rate=rate, layout="mono" if context.channels == 1 else "stereo")
        self._pieces = self._copied() if copied else self._encoded()
        self._next = next(self._pieces, None)

    def __enter__(self) -> "SoundTrack":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()

    def write_until(self, time_s: float) -> None:
        """Writes what is heard before `time_s` of the output."""
        while self._next is not None and self._next[0] < time_s:
            self._output.mux(self._next[1])
            self._next = next(self._pieces, None)

    def _copied(self) -> Iterator[tuple[float, "list[av.Packet[av.AudioStream]]"]]:
        """Packets with their new time stamps, each after its time in the output."""
        for packet, time_s in self._timed():
            packet.pts = packet.dts = round(time_s / packet.time_base)
            packet.stream = self._target
            yield time_s, [packet]

    def _encoded(self) -> Iterator[tuple[float, "list[av.Packet[av.AudioStream]]"]]:
        """As `_copied`, decoded and encoded again."""
        time_s = 0.0
        for packet, time_s in self._timed():
            try:
                frames = packet.decode()
            except BROKEN_VIDEO:
                continue
            for frame in frames:
                # the decoder drops the encoder's lead-in
                into_s = 0.0 if frame.pts is None or packet.pts is None else float((frame.pts - packet.pts) * packet.time_base)
                frame.time_base, frame.pts = packet.time_base, round((time_s + into_s) / packet.time_base)
                if time_s + into_s + frame.samples / frame.sample_rate > 0:
                    yield time_s + into_s, self._target.encode(frame)
        yield time_s, self._target.encode()

    def _timed(self) -> Iterator[tuple["av.Packet[av.AudioStream]", float]]:
        """The packets from a little before the start on, each with its time in the output, rising."""
        clock, last_s, length_s = JoinedClock(self._start_s), float("-inf"), 0.0
        for packet in packets_to_the_end(self._container, self._source):
            stamp = packet.pts if packet.pts is not None else packet.dts
            time_s = max(last_s, 0.0) + length_s
            if stamp is not None:
                time_s = clock.time_s(float(stamp * packet.time_base), last_s, last_s + length_s)
            length_s = float((packet.duration or 0) * packet.time_base)
            if time_s > last_s:
                last_s = time_s
                if time_s > -LEAD_IN_S:
                    yield packet, time_s
