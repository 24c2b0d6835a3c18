"""The drawn rallies: always the same, rightly labelled, and too hard for a frame difference."""

import csv
import errno
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tracknet.data.synthetic import make_rallies, writing
from tracknet.data.synthetic.backdrop import draw_backdrop
from tracknet.data.synthetic.clip import SyntheticClip, make_clip
from tracknet.data.synthetic.clutter import DRAWN_BALL_RADIUS, Clutter
from tracknet.data.synthetic.paint import Layer
from tracknet.data.synthetic.rally import BALL_RADIUS, GRAVITY, NET_HEIGHT, RESTITUTION, Rally, make_rally
from tracknet.data.synthetic.venue import Venue, make_venue
from tracknet.errors import ConfigError, DataError
from tracknet.schema.data import SyntheticConfig
from tracknet.utils.config import build_cfg, typed

SMALL = SyntheticConfig(seed=3, size=[128, 72], clips_per_game=2, frames_per_clip=5)
GAMES = [f"court{number}" for number in range(1, 9)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "Label.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def venue_of(game: str) -> Venue:
    return make_venue(writing._generator(SyntheticConfig(), game, 0), (512, 288))


def clip_of(game: str, number: int = 1, frames: int = 60) -> SyntheticClip:
    return make_clip(writing._generator(SyntheticConfig(), game, number), venue_of(game), frames)


# ---------------------------------------------------------------- writing


def test_a_game_is_the_same_bytes_whatever_is_drawn_beside_it(tmp_path: Path) -> None:
    alone = make_rallies(SMALL, ["court2"], tmp_path / "a")
    among = make_rallies(SMALL, ["court3", "court2", "court1"], tmp_path / "b")
    assert contents(alone / "court2") == contents(among / "court2")
    assert alone.name == among.name
    assert sorted(path.name for path in among.iterdir()) == ["court1", "court2", "court3"]


def test_games_clips_and_seeds_differ(tmp_path: Path) -> None:
    root = make_rallies(SMALL, ["court1", "court2"], tmp_path)
    other = make_rallies(replace(SMALL, seed=4), ["court1"], tmp_path)
    assert other != root
    clips = [root / "court1/Clip1", root / "court1/Clip2", root / "court2/Clip1", other / "court1/Clip1"]
    assert len({(clip / "0000.jpg").read_bytes() for clip in clips}) == 4


def test_layout_and_rows(tmp_path: Path) -> None:
    root = make_rallies(SMALL, ["court1"], tmp_path)
    for number in (1, 2):
        clip = root / f"court1/Clip{number}"
        assert (clip / "Label.csv").read_text(encoding="utf-8").startswith("file name,visibility,x-coordinate,y-coordinate,status\n")
        names = [f"{frame:04d}.jpg" for frame in range(5)]
        assert [row["file name"] for row in rows(clip)] == names
        assert sorted(path.name for path in clip.glob("*.jpg")) == names
        picture = cv2.imread(str(clip / "0000.jpg"))
        assert picture is not None
        assert picture.shape == (72, 128, 3)


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_rallies(SMALL, ["court1"], tmp_path)
    monkeypatch.setattr(writing, "_make_game", lambda *_: pytest.fail("made again"))
    assert make_rallies(SMALL, ["court1"], tmp_path) == root


def test_processes_may_race(tmp_path: Path) -> None:
    """Several processes start on the same empty cache; each finds the whole game, and no scaffolding stays."""
    code = f"""
import sys
from pathlib import Path
from tracknet.data.synthetic import make_rallies
from tracknet.schema.data import SyntheticConfig
from tracknet.utils.config import build_cfg, typed
print("ready", flush=True)
sys.stdin.readline()
root = make_rallies({SMALL!r}, ["court1", "court2"], Path({str(tmp_path)!r}))
print(root, sum(1 for _ in root.glob("court*/Clip*/*.jpg")))
"""
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    root, count = answers[0][0].split()
    assert count == "20"
    assert sorted(path.name for path in Path(root).iterdir()) == ["court1", "court2"]
    alone = make_rallies(SMALL, ["court1"], tmp_path / "alone")
    assert contents(alone / "court1") == contents(Path(root) / "court1")


def test_another_process_finishing_first_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = make_rallies(SMALL, ["court1"], tmp_path / "first")
    row = writing._row

    def slow_row(name: str, label: writing.Label) -> str:
        place = tmp_path / "second/synthetic" / finished.name / "court1"
        if not place.exists():
            (finished / "court1").rename(place)
        return row(name, label)

    monkeypatch.setattr(writing, "_row", slow_row)
    root = make_rallies(SMALL, ["court1"], tmp_path / "second")
    assert [path.name for path in root.iterdir()] == ["court1"]
    assert len(list(root.glob("court1/Clip*/*.jpg"))) == 10


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "0003.jpg":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"No space left on device; set data\.cache_dir") as caught:
        make_rallies(SMALL, ["court1"], tmp_path)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")]
    monkeypatch.undo()
    assert len(rows(make_rallies(SMALL, ["court1"], tmp_path) / "court1/Clip1")) == 5


@pytest.mark.parametrize("game", ["", ".", "..", "../court1", "a/b", "/court1", ".hidden"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, game: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.split"):
        make_rallies(SMALL, ["court1", game], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [[64, 64], [200, 64], [96, 160]])
def test_any_size_works(tmp_path: Path, size: list[int]) -> None:
    root = make_rallies(SyntheticConfig(size=size, clips_per_game=1, frames_per_clip=1), ["court1"], tmp_path)
    picture = cv2.imread(str(root / "court1/Clip1/0000.jpg"))
    assert picture is not None
    assert picture.shape == (size[1], size[0], 3)


# ---------------------------------------------------------------- physics

seeds = st.integers(0, 2**32 - 1)


def rally_of(seed: int) -> Rally:
    return make_rally(np.random.default_rng(seed), 10.0)


@given(seed=seeds, share=st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_between_rackets_and_bounces_only_gravity_acts(seed: int, share: float) -> None:
    rally = rally_of(seed)
    for flight in rally.flights:
        step = (flight.end - flight.start) * min(share, 1 - share) / 2
        middle = flight.start + share * (flight.end - flight.start)
        seen = [rally.ball(middle + shift) for shift in (-step, 0.0, step)]
        assert all(place is not None for place in seen)
        before, here, after = (np.asarray(place) for place in seen)
        assert (after - 2 * here + before) == pytest.approx([0.0, 0.0, -GRAVITY * step**2], abs=1e-9)


@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_bounces_nets_and_contacts_are_where_they_belong(seed: int) -> None:
    rally = rally_of(seed)
    contact_times = [contact.time for contact in rally.contacts]
    for before, after in itertools.pairwise(rally.flights):
        if before.end != after.start:
            continue  # a pause
        assert before.at(before.end) == pytest.approx(after.position, abs=1e-9)
        if before.end in rally.bounces:
            assert after.position[2] == pytest.approx(BALL_RADIUS, abs=1e-9)
            assert after.velocity[2] == pytest.approx(-RESTITUTION * before.velocity_at(before.end)[2])
        else:
            assert before.end in contact_times
    for flight in rally.flights:
        assert min(flight.at(time)[2] for time in np.linspace(flight.start, flight.end, 20)) > BALL_RADIUS - 1e-6
        if flight.position[1] * flight.at(flight.end)[1] < 0:
            at_net = flight.start - flight.position[1] / flight.velocity[1]
            assert flight.at(at_net)[2] > NET_HEIGHT + BALL_RADIUS


# ---------------------------------------------------------------- pictures and labels


NO_CLUTTER = Clutter([], [], [], np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 3)), [])


def plain(clip: SyntheticClip) -> SyntheticClip:
    """The clip on a black ground in even light, without clutter, so that each pixel of the ball stands out."""
    return replace(clip, still=np.zeros_like(clip.still), light=np.ones_like(clip.light), clutter=NO_CLUTTER)


@pytest.mark.parametrize("game", GAMES)
def test_the_label_is_the_middle_of_what_the_ball_changes(game: str) -> None:
    clip, compared = plain(clip_of(game)), 0
    for frame in range(0, 60, 3):
        picture, label = clip.draw(frame)
        without, nothing = clip.draw(frame, with_ball=False)
        assert nothing.visibility == 0
        changed = np.abs(picture.astype(int) - without).max(axis=2)
        if label.visibility != 1:
            continue
        assert label.xy_px is not None
        margin = 12
        x, y = label.xy_px
        if not (margin < x < 511 - margin and margin < y < 287 - margin):
            continue  # cut by the border
        row, column = np.nonzero(changed > 3)  # the noise is the same in both
        assert np.mean(column) == pytest.approx(x, abs=0.5)
        assert np.mean(row) == pytest.approx(y, abs=0.5)
        compared += 1
    assert compared >= 5


def test_labels_lie_inside_and_only_where_there_is_a_ball() -> None:
    found = {0: 0, 1: 0, 2: 0, 3: 0}
    for game in GAMES[:6]:
        clip = clip_of(game)
        for frame in range(0, 60, 2):
            _, label = clip.draw(frame)
            found[label.visibility] += 1
            if label.visibility == 0:
                assert label.xy_px is None
                assert label.status is None
            else:
                assert label.xy_px is not None
                assert 0 <= label.xy_px[0] <= 511
                assert 0 <= label.xy_px[1] <= 287
                assert clip.rally.ball(clip.times[frame]) is not None
    assert found[0] > 0
    assert found[2] > 0
    assert found[1] > 120


def test_a_ball_behind_something_is_hidden_and_keeps_its_place() -> None:
    """An opaque curtain in the plane of the net hides the ball beyond it, and no other."""
    clip = clip_of("court1")
    curtain = Layer(slice(0, 288), slice(0, 512), np.zeros((288, 512, 4), np.float32), np.ones((288, 512, 1), np.float32))
    curtained = replace(clip, net=curtain, clutter=replace(clip.clutter, birds=[]))
    beyond = before = 0
    for frame in range(60):
        place = clip.rally.ball(clip.times[frame])
        _, label = curtained.draw(frame)
        if place is None or label.xy_px is None:
            continue
        assert label.xy_px == clip.draw(frame)[1].xy_px
        if place[1] > 0:
            assert label.visibility == 3
            beyond += 1
        else:
            assert label.visibility in (1, 2)
            before += 1
    assert beyond
    assert before


def test_a_ball_outside_of_the_picture_has_no_label() -> None:
    clip = clip_of("court1")
    camera = replace(clip.venue.camera, position=clip.venue.camera.position + np.array([60.0, 0.0, 0.0]))
    aside = replace(clip, venue=replace(clip.venue, camera=camera))
    assert any(aside.ball_px(frame) is not None for frame in range(60))
    assert all(aside.draw(frame)[1].visibility == 0 for frame in range(60))


def test_the_ball_is_of_a_size_that_can_be_learnt() -> None:
    for game in GAMES:
        camera = venue_of(game).camera
        far, near = (DRAWN_BALL_RADIUS * camera.metres_to_px(np.array([0.0, y, 1.0])) for y in (13.0, -13.0))
        assert 1.4 < far < near < 4.2


def test_every_game_has_its_own_court_and_camera() -> None:
    venues = [venue_of(game) for game in GAMES]
    backdrops = [draw_backdrop(np.random.default_rng(0), venue).astype(float) for venue in venues]
    for one, other in itertools.combinations(range(len(GAMES)), 2):
        assert np.abs(backdrops[one] - backdrops[other]).mean() > 10
        assert np.linalg.norm(venues[one].camera.position - venues[other].camera.position) > 0.5
        assert venues[one].camera.focal_px != venues[other].camera.focal_px
    assert len({venue.surface for venue in venues}) >= 4


# ---------------------------------------------------------------- hard enough to mean something

Pictures = NDArray[np.float32]  # (N, H, W)


def to_previous(clip: Pictures) -> Pictures:
    return np.abs(clip - clip[[0, *range(len(clip) - 1)]])


def to_both_neighbours(clip: Pictures) -> Pictures:
    return np.minimum(to_previous(clip), to_previous(clip[::-1])[::-1])


def to_background(clip: Pictures) -> Pictures:
    return np.abs(clip - np.median(clip[::3], axis=0))


def best_f1(found: list[tuple[float, tuple[int, int], tuple[float, float] | None]]) -> float:
    """F1 by the rule of TrackNetV2 (at most 4 px between whole coordinates), at the threshold that suits the detector best."""
    best = 0.0
    for threshold in {score for score, _, _ in found}:
        right = wrong = missed = 0
        for score, guess, truth in found:
            if score < threshold:
                missed += truth is not None
            elif truth is not None and np.hypot(guess[0] - int(truth[0]), guess[1] - int(truth[1])) <= 4:
                right += 1
            else:
                wrong += 1
        best = max(best, 2 * right / (2 * right + wrong + missed))
    return best


@pytest.fixture(scope="module")
def val_clips(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Pictures, list[tuple[float, float] | None]]]:
    demo = typed(build_cfg("demo", "demo", "demo", dry_run=True)).data  # as it ships
    assert demo.synthetic is not None
    root = make_rallies(demo.synthetic, demo.split.val_games, tmp_path_factory.mktemp("demo"))
    clips = []
    for folder in sorted(path for game in demo.split.val_games for path in (root / game).iterdir()):
        pictures = [cv2.imread(str(folder / row["file name"]), cv2.IMREAD_GRAYSCALE) for row in rows(folder)]
        truth = [(float(row["x-coordinate"]), float(row["y-coordinate"])) if int(row["visibility"]) >= 1 else None for row in rows(folder)]
        clips.append((np.stack(pictures).astype(np.float32), truth))  # type: ignore[arg-type]
    return clips


@pytest.mark.parametrize(("detector", "bound"), [(to_previous, 0.4), (to_both_neighbours, 0.4), (to_background, 0.5)])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_the_brightest_difference_is_not_the_ball(
    val_clips: list[tuple[Pictures, list[tuple[float, float] | None]]], detector: Callable[[Pictures], Pictures], bound: float, sigma: float
) -> None:
    found = []
    for clip, truth in val_clips:
        for difference, ball in zip(detector(clip), truth, strict=True):
            blurred = cv2.GaussianBlur(difference, (0, 0), sigma)
            row, column = np.unravel_index(int(blurred.argmax()), blurred.shape)
            found.append((float(blurred.max()), (int(column), int(row)), ball))
    assert sum(truth is not None for _, _, truth in found) > 150
    assert best_f1(found) < bound
