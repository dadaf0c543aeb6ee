"""A page in the browser: two images in, or a bundled sample; fused image, features, scores and a download out.

python app.py                                                # then open http://127.0.0.1:7860
python app.py --system mlfuse --weights model_fuse.pth       # to choose from, beside those in models/
python app.py --host 0.0.0.0 --max-pixels 2e6 --max-memory 4GB             # for others on the network, too

Needs `pip install gradio`. Nothing is fetched from elsewhere: the page works offline, and sends nothing home.
"""

import argparse
import contextlib
import html
import json
import math
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import utils  # noqa: F401  before torch, see there

# isort: split
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from utils.common import InputError, Parser, in_checkout, number_in, run_script, sigterm_as_ctrl_c
from utils.data.images import read_grey, to_uint8, write_image
from utils.data.pairs import find_modalities, list_pairs, task_of
from utils.data.readers import Reading, auto_range, values_in
from utils.data.registration import edge_shift, register, resize
from utils.data.sources import Source, read_source
from utils.evaluation.folders import BASELINES
from utils.inference import fusing
from utils.inference.memory import format_size, parse_size
from utils.metrics import METRICS, PROTOCOLS, score
from zoo import SYSTEMS, TASKS, find_system

FEATURE_PIXELS = 150_000  # feature maps are shown small; those of CDDFuse took 2500 bytes a pixel
SIDES = ("vis", "ir")
SAMPLE_SETS = {"Sample_IVF": "ivf", "Sample_MRI_CT": "mif", "Sample_MRI_PET": "mif"}
WORDS = json.loads(in_checkout("page", "words.json").read_text(encoding="utf-8"))  # language -> key -> text


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="who reaches it can use the page (default: 127.0.0.1, this machine only)")
    add("--port", type=number_in(int, 1, 2**16 - 1), help="default: 7860, or the next free one")
    add("--system", choices=SYSTEMS, default="cddfuse", help="the one that is shown first (default: cddfuse)")
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE", help="of it, beside those in models/")
    add("--max-pixels", type=number_in(float, 1, 1e12), default=4e6, metavar="N", help="of an image (default: 4e6)")
    add("--max-upload", type=parse_size, default="32MB", metavar="SIZE", help="of a file (default: 32MB)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="of the scores (default: paper)")
    fusing.add_inference_options(parser)
    return parser


def serve(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C or SIGTERM."""
    fusing.keep_freed_memory()
    with sigterm_as_ctrl_c(), contextlib.suppress(KeyboardInterrupt), running(args) as address:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    return 0


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[str]:
    """The address of the page, which is there within the block. Uploads and results are removed when it ends.

    Raises:
        InputError: Gradio is not installed, weights do not fit, or the address cannot be listened on.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise InputError(f"the page needs Gradio ({error}); run: pip install gradio") from error
    with tempfile.TemporaryDirectory(prefix="fusion-page-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page, words = build(gr, Desk(args, Path(folder)))
        try:
            kind = socket.AF_INET6 if ":" in args.host else socket.AF_INET
            socket.create_server((args.host, args.port or 0), family=kind).close()  # Gradio would try 100 ports aloud
            _, address, _ = page.queue(max_size=32).launch(
                server_name=args.host, server_port=args.port, max_file_size=args.max_upload, i18n=words, quiet=True,
                css_paths=in_checkout("page", "style.css"), prevent_thread_lock=True, footer_links=[], share=False,
                run_history=False, enable_monitoring=False, theme=gr.themes.Default(font="system-ui"),
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"cannot listen on --host {args.host} --port {args.port or 7860} ({error})") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


class Desk:
    """Reads, fuses and scores what the page asks for. Files keep the names that their owners gave them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.device = args, folder, fusing.pick_device(args.device)
        self.how = {"max_memory": args.max_memory, "scratch": args.scratch}
        self.how["precision"] = fusing.pick_precision(args.precision, self.device)
        self.load = cache(fusing.load_fuser)
        self.weights: dict[str, dict[str, Path]] = {}  # system -> name of a file -> the file
        for name in SYSTEMS:
            bundled = [file for files in find_system(name).weights.values() for file in files]
            self.weights |= {name: {file: in_checkout("models", file) for file in bundled}} if bundled else {}
        for path in args.weights:
            fusing.load_fuser(find_system(args.system), "mif", path)  # what is wrong is said now
            self.weights.setdefault(args.system, {})[path.name] = path
        self.work: dict[str, float] = {}  # system -> numbers that its modules are given for a pixel
        self.cancelled: set[str] = set()  # sessions of the browser

    def read(self, path: str | None, key: str, spread: bool = False) -> Source:
        """An uploaded image, or an InputError; `key` says in `WORDS` what it is, `spread` is `--ir-range auto`."""
        if path is None:
            raise InputError(f"there is no image yet: {WORDS['en'][key]}")
        name = f"{Path(path).name} ({WORDS['en'][key]})"
        try:
            memory = fusing.memory_for_files(self.args.max_memory, self.device)
            reading = Reading("ir" if key.startswith("ir") else "vi", memory=memory)
            if spread:
                reading = reading._replace(range=auto_range(reading, [values_in(Path(path), reading)], name))
            source = read_source(Path(path), reading)._replace(name=name)
        except FileNotFoundError as error:
            raise InputError(f"{name} is no longer here: files are removed after a while; choose it again") from error
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from error
        if source.grey.size > self.args.max_pixels:
            raise InputError(f"{name} has more than {self.args.max_pixels / 1e6:.3g} megapixels; reduce it")
        return source

    def fuse(
        self, vis: Source, ir: Source, task: str, system: str, weights: str, colour: str,
        tell: Callable[[float, float], None],
    ) -> tuple[np.ndarray, Path, str, list, Sequence[str]]:  # fmt: skip
        """The fused image, its file, how it was made, its features, and the metrics to show.

        `tell` is given the share that is done and the seconds that are left, now and then; what it raises ends the run.
        """
        done, total, started, told = 0, math.inf, time.monotonic(), 0.0

        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            nonlocal done, told
            done += sum(value.numel() for value in inputs if isinstance(value, Tensor))
            if (now := time.monotonic()) - told > 0.3:  # seconds
                share, told = min(done / total, 0.99), now
                tell(share, (now - started) * (1 / share - 1) if share else math.inf)

        fuser = self.load(find_system(system), task, self.weights[system][weights], device=self.device)
        model, skip = fuser.system, fuser.skip
        with register_module_forward_pre_hook(count):
            if system not in self.work:  # a small image tells
                side = max(64, model.smallest_side)
                fusing.fuse_arrays(model, *np.zeros((2, side, side), np.float32), skip, normalise=False, **self.how)
                self.work[system] = done / side**2
            done, total, started = 0, self.work[system] * vis.grey.size, time.monotonic()
            fused = fusing.fuse_sources(model, vis, ir, skip, colour, normalise=fuser.normalised, **self.how)
        self.work[system] = done / vis.grey.size
        tell(1, 0)
        facts = f"{model.label}, {weights} (sha256 {fuser.sha256[:12]}), decoder image: {skip}, "
        facts += f"{vis.size[1]}x{vis.size[0]}, {time.monotonic() - started:.1f}\u00a0s, {self.device.type}"
        file = Path(tempfile.mkdtemp(dir=self.folder)) / f"{Path(vis.name.rsplit(' (', 1)[0]).stem}_fused.png"
        write_image(file, fused)
        scale = min(1, math.sqrt(FEATURE_PIXELS / vis.grey.size))
        size = tuple(max(round(side * scale), model.smallest_side) for side in vis.size)
        features = fusing.feature_maps(model, resize(vis.grey, size), resize(ir.grey, size))
        return fused, file, facts, [(image, name) for name, image in features.items()], model.columns

    def table(self, fused: Path, vis: Source, ir: Source, names: Sequence[str], columns: Sequence[str]) -> str:
        """Scores of a file, of either source alone and of their average, as Markdown; ValueError: there are none."""
        images = read_grey(fused), *(make(vis.grey, ir.grey) for make in BASELINES.values())
        rows = [score(image, ir.grey, vis.grey, self.args.protocol, columns) for image in images]
        lines = [f"| | {' | '.join(names)} | |", "|---|" + "---:|" * len(names) + "---|"]
        for key in columns:
            first, *others = ("–" if math.isnan(row[key]) else f"{row[key]:.2f}" for row in rows)
            arrow = "↑" if METRICS[key].better == "higher" else "↓"
            lines.append(f"| **{key}** {arrow} | **{first}** | {' | '.join(others)} | {METRICS[key].name} |")
        return "\n".join(lines)


def task_seen(paths: Sequence[str], sources: Sequence[Source]) -> str:
    """The task that the names of a pair speak of; else "mif" where the frames of both, three pixels wide, are black.

    At least 95 % of the frame is black in 136 medical pairs, at most 69 % in 115 of TNO, RoadScene and MSRS.
    """
    frame = np.ones(sources[0].size, bool)
    frame[3:-3, 3:-3] = False
    black = all((source.grey[frame] < 16).mean() > 0.9 for source in sources)
    return task_of(*map(Path, paths)) or ("mif" if black else "ivf")


def build(gr: ModuleType, desk: Desk) -> tuple[Any, Any]:
    """The page, a `gr.Blocks`, and its words, a `gr.I18n`: of the browser's language."""
    words, bar = gr.I18n(**WORDS), gr.Progress()
    gr.set_static_paths([in_checkout("test_img").resolve()])
    samples = [
        (task, [str(path.resolve()) for path in (pair.vis, pair.ir)])
        for name, task in SAMPLE_SETS.items()
        for pair in list_pairs(*find_modalities(in_checkout("test_img", name))).pairs
    ]

    def fit(task: str, system: str, *paths: str) -> list:
        """What the kind of images and the system change: names and choices, and that they are there."""
        roles = [words(f"{side}_{task}") for side in SIDES]
        values = [{"value": path} for path in paths] or [{}, {}]
        offered = list(desk.weights[system])
        bundled = [name for name in find_system(system).weights[task] if name in offered]
        return [
            *(gr.File(label=role, **value) for role, value in zip(roles, values, strict=True)),
            gr.Column(visible=True),
            gr.Radio([(words("both"), "both"), (roles[0], "vis"), (roles[1], "ir"), (words("none"), "none")]),
            gr.Dropdown(offered, value=(bundled or offered[:1])[-1]),
            *(gr.Tab(label=role) for role in roles),
        ]

    def take_sample(event: gr.SelectData) -> list:
        task, paths = samples[event.index]
        return [task, desk.args.system, False, False, *fit(task, desk.args.system, *paths)]

    @contextlib.contextmanager
    def one_line() -> Iterator[None]:
        """Shows bad input as one line. Of other errors Gradio says that there is one; the terminal says which."""
        try:
            yield
        except InputError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    @one_line()
    def preview(side: str, path: str | None, task: str) -> Any:
        if path is None:
            return gr.Image(visible=False, value=None)
        image = to_uint8(desk.read(path, f"{side}_{task}").shown)
        return gr.Image(image, visible=True, label=f"{image.shape[1]}x{image.shape[0]}")

    def is_stale(done: list | None, *inputs: Any) -> Any:
        return gr.Markdown(visible=done is not None and done != list(inputs))

    def is_busy(busy: bool) -> list:
        return [gr.Button(interactive=not busy), gr.Button(visible=busy)]

    def cancel(request: gr.Request) -> None:
        desk.cancelled.add(request.session_hash)

    @one_line()
    def fuse(vis, ir, task, system, weights, colour, resized, spread, request: gr.Request, progress=bar) -> dict:
        say = WORDS["zh" if request.headers.get("accept-language", "").startswith("zh") else "en"]
        inputs = [vis, ir, task, system, weights, colour, resized, spread]

        def tell(share: float, seconds: float) -> None:
            if request.session_hash in desk.cancelled:
                raise CancelledError
            key = "fusing" if share < 0.02 else "left" if share < 1 else "scoring"
            progress(share, say[key].format(seconds=seconds))

        if task is None or weights not in desk.weights.get(system, {}):
            raise InputError("choose the kind of the images, a system, and weights of that system")
        try:
            sources = [desk.read(vis, f"vis_{task}"), desk.read(ir, f"ir_{task}", spread)]
            advice = "tick the box that resizes, or crop one of them"
            sources[1] = register(*sources, resize_ir=resized, advice=advice)
            fused, file, facts, maps, columns = desk.fuse(*sources, task, system, weights, colour, tell)
            notes, table = [] if task_seen((vis, ir), sources) == task else [say[f"not_{task}"]], ""
            # MRI and CT, PET or SPECT have too few edges in common for the check to mean anything.
            if task == "ivf" and (shift := edge_shift(sources[0].grey, sources[1].grey)) and shift.misaligned:
                notes.append(say["misaligned"].format(shift=shift))
            names = [say[key] for key in ("fused", f"vis_{task}", f"ir_{task}", "average")]
            try:
                table = desk.table(file, *sources, names, columns)
            except ValueError as error:
                notes.append(say["no_scores"].format(error=error))
        except CancelledError:
            return {status: say["cancelled"]}
        finally:
            desk.cancelled.discard(request.session_hash)
        compared = [(to_uint8(source.shown), to_uint8(fused)) for source in sources]
        return dict(zip(sliders, compared, strict=True)) | {
            status: "\n".join([facts, *notes]), results: gr.Column(visible=True), stale: gr.Markdown(visible=False),
            done: inputs, features: maps, scores: table, download: str(file),
        }  # fmt: skip

    with gr.Blocks(title="Image fusion", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# Image fusion\n{words('about')}")
        gr.Markdown(f"{words('limits')} {desk.args.max_pixels / 1e6:g} MP, {format_size(desk.args.max_upload)}.")
        gallery = gr.Gallery(
            [paths[0] for _, paths in samples], show_label=False, columns=len(samples), height="auto",
            object_fit="cover", allow_preview=False, interactive=False, buttons=[], elem_id="samples",
        )  # fmt: skip
        done, tabs, sliders = gr.State(), [], []
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                task = gr.Radio([(words(task), task) for task in TASKS], label=words("kind"), elem_id="task")
                with gr.Column(visible=False) as options:
                    with gr.Row():
                        files = [gr.File(height=110, min_width=140, elem_id=side) for side in SIDES]
                    with gr.Row():
                        images = [gr.Image(visible=False, interactive=False, buttons=[], min_width=140) for _ in SIDES]
                    resized, spread = (gr.Checkbox(label=words(key), elem_id=key) for key in ("resize", "spread"))
                    colour = gr.Radio(value="both", label=words("colour"), elem_id="colour")
                    with gr.Row():
                        systems = [(find_system(name).label, name) for name in desk.weights]
                        system = gr.Dropdown(systems, value=desk.args.system, label=words("system"), min_width=140)
                        weights = gr.Dropdown(label=words("weights"), min_width=190)
                    fuse_button = gr.Button(words("fuse"), variant="primary", elem_id="fuse")
                    cancel_button = gr.Button(words("cancel"), visible=False, elem_id="cancel")
            with gr.Column(scale=7, min_width=340):
                status = gr.Textbox(placeholder=words("nothing"), show_label=False, interactive=False, elem_id="status")
                with gr.Column(visible=False, elem_id="results") as results:
                    stale = gr.Markdown(words("stale"), visible=False, elem_id="stale")
                    with gr.Tabs():
                        for _ in SIDES:
                            with gr.Tab() as tab:
                                sliders.append(gr.ImageSlider(format="png", interactive=False, show_label=False))
                            tabs.append(tab)
                        with gr.Tab(words("features")):
                            features = gr.Gallery(show_label=False, height="auto", format="png", elem_id="maps")
                    download = gr.DownloadButton(words("download"), elem_id="download")
                    scores = gr.Markdown(elem_id="scores")
                    gr.Markdown(f"{words('scores')} {desk.args.protocol}.")

        inputs = [*files, task, system, weights, colour, resized, spread]
        outputs = [status, results, done, stale, features, scores, *sliders, download]
        fitted, buttons = [*files, options, colour, weights, *tabs], [fuse_button, cancel_button]
        quiet = {"show_progress": "hidden", "queue": False}
        for side, file, image in zip(SIDES, files, images, strict=True):
            file.change(partial(preview, side), [file, task], image, show_progress="hidden", api_name=f"preview_{side}")
        gr.on([task.input, system.input], fit, [task, system], fitted, **quiet)
        gr.on([part.change for part in inputs], is_stale, [done, *inputs], stale, **quiet)
        picked = gallery.select(take_sample, None, [task, system, resized, spread, *fitted], **quiet)
        for start in (fuse_button.click, picked.then):
            begun = start(lambda: is_busy(True), None, buttons, **quiet)
            ran = begun.then(fuse, inputs, outputs, show_progress_on=status, concurrency_id="fuse")
            ran.then(lambda: is_busy(False), None, buttons, **quiet)
        cancel_button.click(cancel, None, None, **quiet)
        page.unload(cancel)
    return page, words


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(serve, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
