"""A page in the browser: two images in, or a bundled sample; fused image, features, scores and a download out.

python app.py                                                # then open http://127.0.0.1:7860
python app.py --weights runs/cddfuse_ivf/CDDFuse_IVF.pth model_fuse.pth    # to choose from, beside those in models/
python app.py --host 0.0.0.0 --max-pixels 2e6 --max-memory 4GB             # for others on the network, too

Needs `pip install gradio`. Nothing is fetched from elsewhere: the page works offline, and sends nothing home.
"""

import argparse
import contextlib
import html
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from utils.common import InputError, file_sha256, in_checkout, run_script, sigterm_as_ctrl_c
from utils.data.images import read_grey, to_uint8, write_image
from utils.data.pairs import find_modalities, list_pairs, task_of
from utils.data.readers import Reading, auto_range, values_in
from utils.data.registration import edge_shift, resize
from utils.data.sources import Registration, Source, read_source
from utils.inference import fusing
from utils.inference.colour import fuse_sources
from utils.inference.memory import format_size, parse_size
from utils.metrics import METRICS, PROTOCOLS, score
from utils.training.monitor import feature_maps
from zoo import SYSTEMS, TASKS, find_system

FOLDER = "fusion-page-"  # in the system's temporary folder, one for each page that runs
SWEEP_S, KEPT_S, QUOTA = 20, 3600, 2 * 10**9  # seconds between two looks at the files of users; their age; bytes of all
FEATURE_PIXELS = 150_000  # feature maps are shown small; those of CDDFuse took 2500 bytes a pixel
SIDES = ("vis", "ir")
SAMPLE_SETS = {"Sample_IVF": "ivf", "Sample_MRI_CT": "mif", "Sample_MRI_PET": "mif"}
WORDS = json.loads(in_checkout("page", "words.json").read_text(encoding="utf-8"))  # key -> English, Chinese


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only")
    add("--port", type=int, help="default: 7860, or the next free one")
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE", help="to choose from, beside those in models/")
    add("--max-pixels", type=float, default=4e6, metavar="N", help="of an image (default: 4e6)")
    add("--max-upload", type=parse_size, default="32MB", metavar="SIZE", help="of a file (default: 32MB)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="of the scores (default: paper)")
    fusing.add_inference_options(parser)
    add("--debug", action="store_true", help="show tracebacks")
    return run_script(serve, parser.parse_args(argv))


def serve(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C, SIGTERM or SIGHUP; uploads and results are then removed."""
    # Variables such as GRADIO_SHARE or GRADIO_ALLOWED_PATHS would open what nobody asked this script to open.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    # It asks itself whether it answers, which must not go through a proxy.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost,127.0.0.1")))
    try:
        import gradio as gr
    except ImportError as error:
        raise InputError(f"the page needs Gradio ({error}); run: pip install gradio") from error
    fusing.keep_freed_memory()
    with sigterm_as_ctrl_c(), tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as folder:
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else it is nohup's
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        os.environ["GRADIO_TEMP_DIR"] = folder
        page, words = build(gr, Desk(args, Path(folder)))
        page.queue(max_size=32, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=args.host, server_port=args.port, max_file_size=args.max_upload, i18n=words, quiet=True,
                theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"), footer_links=[], run_history=False,
                css_paths=in_checkout("page", "style.css"), prevent_thread_lock=True, share=False, ssr_mode=False,
                mcp_server=False, enable_monitoring=False,
            )  # fmt: skip
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if args.host not in ("127.0.0.1", "localhost", "::1"):
                print("warning: everybody who reaches this address can use the page", file=sys.stderr, flush=True)
            while True:
                with contextlib.suppress(OSError):  # of a file that went meanwhile
                    sweep(Path(folder), KEPT_S, QUOTA)
                time.sleep(SWEEP_S)
        except OSError as error:
            where = f"{args.host}, port {args.port or 'from 7860 on'}"
            raise InputError(f"cannot listen on {where}; name others with --host and --port") from error
        except KeyboardInterrupt:
            print("ended")
        finally:
            page.close(verbose=False)
    return 0


def sweep(folder: Path, age_s: float, quota: int) -> None:
    """Removes old files below a folder, the oldest of the rest beyond a quota in bytes, and folders of dead pages.

    Gradio's `delete_cache` knows neither cancelled uploads nor a quota. A live page touches its folder at each sweep.
    """
    os.utime(folder)
    now, total = time.time(), 0
    for other in folder.parent.glob(f"{FOLDER}*"):
        if now - other.stat().st_mtime > 10 * SWEEP_S:
            shutil.rmtree(other, ignore_errors=True)
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    for about, path in sorted(files, key=lambda file: -file[0].st_mtime):
        total += about.st_size
        if now - about.st_mtime > age_s or total > quota:
            path.unlink(missing_ok=True)


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Desk:
    """Fuses what the page asks for, one pair at a time. Files keep the names that their owners gave them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.device = args, folder, fusing.pick_device(args.device)
        precision = fusing.pick_precision(args.precision, self.device)
        self.how = {"precision": precision, "max_memory": args.max_memory, "scratch": args.scratch}
        self.weights = weights_by_system(args.weights)
        self.models: dict[tuple[str, str, str], tuple[Any, str]] = {}
        self.work: dict[str, float] = {}  # system -> elements that its modules are given for a pixel
        self.worker = ThreadPoolExecutor(1)

    def read(self, path: str | None, key: str, spread: bool = False) -> Source:
        """An uploaded image.

        Args:
            path: where Gradio has put it.
            key: of what it is in `WORDS`.
            spread: as `--ir-range auto`.

        Raises:
            InputError: nothing was uploaded, it is too large, or it is no image.
        """
        role = WORDS[key][0]
        if path is None:
            raise InputError(f"there is no image yet: {role}")
        name = f"{Path(path).name} ({role})"
        try:
            reading = Reading("ir" if key.startswith("ir") else "vi", memory=self.args.max_memory)
            if spread:
                reading = replace(reading, range=auto_range(reading, [values_in(Path(path), reading)], name))
            source = read_source(Path(path), reading)._replace(name=name)
        except FileNotFoundError as error:
            raise InputError(f"{name} is no longer here: files are removed after a while; choose it again") from error
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from error
        if source.grey.size > self.args.max_pixels:
            raise InputError(
                f"{name} has {source.grey.size / 1e6:.3g} megapixels, more than this page takes; reduce it"
            )
        return source

    def fuse(self, *inputs: Any) -> Iterator[Any]:
        """Yields the job now and then, and at last what `_fuse` gives. Closing it cancels the job."""
        job = SimpleNamespace(started=0.0, done=0, total=math.inf, cancelled=False)
        future = self.worker.submit(self._fuse, job, *inputs)
        try:
            while wait([future], timeout=0.5).not_done:
                yield job
            yield future.result()
        finally:
            job.cancelled = True
            future.cancel()

    def _fuse(
        self, job: SimpleNamespace, vis: Source, ir: Source, task: str, system: str, weights: str, colour: str
    ) -> tuple[np.ndarray, list[Path], str, list, Sequence[str]]:
        """The fused image, its files of 8 and 16 bits, how it was made, its features, and the metrics to show."""
        self.job = job
        model, skip = self._model(system, weights, task)
        if system not in self.work:  # a small image tells
            side = max(64, model.smallest_side)
            fusing.fuse_arrays(model, *np.zeros((2, side, side), np.float32), skip, **self.how)
            self.work[system] = job.done / side**2
        job.done, job.total, job.started = 0, self.work[system] * vis.grey.size, time.monotonic()
        fused = fuse_sources(model, vis, ir, skip, colour=colour, normalise=model.stretched, **self.how)
        self.work[system] = job.done / vis.grey.size
        height, width = vis.size
        facts = (
            f"{model.label}, {weights} (sha256 {file_sha256(self.weights[system][weights])[:12]}), {model.skip_name}: "
            f"{skip}, {width}x{height}, {time.monotonic() - job.started:.1f}\u00a0s, {self.device.type}"
        )
        stem, folder = Path(vis.name.rsplit(" (")[0]).stem, Path(tempfile.mkdtemp(dir=self.folder))
        files = [folder / f"{stem}_fused.png", folder / f"{stem}_fused_16bit.png"]
        for file, bits in zip(files, (8, 16), strict=True):
            write_image(file, fused, bits=bits)
        scale = min(1, math.sqrt(FEATURE_PIXELS / vis.grey.size))
        size = tuple(max(round(side * scale), model.smallest_side) for side in vis.size)
        features = feature_maps(model, resize(vis.grey, size), resize(ir.grey, size))
        return fused, files, facts, [(image, name) for name, image in features.items()], model.columns

    def _model(self, system: str, weights: str, task: str) -> tuple[Any, str]:
        """The system with its weights, and what its decoder is given; its modules count and look for a cancel."""

        def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if self.job.cancelled:
                raise Cancelled
            self.job.done += inputs[0].numel()

        key = system, weights, task
        if key not in self.models:
            model, skip = fusing.load_system(
                find_system(system), self.weights[system][weights], task, None, self.device
            )
            for module in model.modules():
                if not list(module.children()):
                    module.register_forward_pre_hook(count)
            self.models[key] = model, skip
        return self.models[key]

    def table(self, fused: Path, vis: Source, ir: Source, names: Sequence[str], columns: Sequence[str]) -> str:
        """Scores of a file, of either source alone and of their average, as Markdown: a metric a row.

        Raises:
            ValueError: an image is too small or too dark for a metric.
        """
        images = read_grey(fused), vis.grey, ir.grey, np.round((vis.grey + ir.grey) / 2)
        rows = [score(image, ir.grey, vis.grey, self.args.protocol, columns) for image in images]
        lines = [f"| | {' | '.join(names)} | |", "|---|" + "---:|" * len(names) + "---|"]
        for key in columns:
            first, *others = (f"{row[key]:.2f}" for row in rows)
            arrow = "↑" if METRICS[key].better == "higher" else "↓"
            lines.append(f"| **{key}** {arrow} | **{first}** | {' | '.join(others)} | {METRICS[key].name} |")
        return "\n".join(lines)


def weights_by_system(extra: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """System -> name -> file: what is bundled, and further files under each system whose keys they hold."""
    systems = {name: find_system(name) for name in SYSTEMS}
    offered = {
        name: {file: in_checkout("models", file) for files in system.weights.values() for file in files}
        for name, system in systems.items()
    }
    for path in extra:
        reasons = []
        for name, system in systems.items():
            try:
                fusing.load_system(system, path, "ivf", None, "cpu")
                if offered[name].setdefault(path.name, path) != path:
                    raise InputError(f"another file is called {path.name}; rename one")
            except InputError as error:
                reasons.append(str(error))
        if len(reasons) == len(systems):
            raise InputError(f"--weights: {path} fits none of {', '.join(SYSTEMS)}: {reasons[0]}")
    return {name: files for name, files in offered.items() if files}


def task_seen(paths: Sequence[str], sources: Sequence[Source]) -> str:
    """The task that the names of a pair speak of; else "mif" where the frames of both, three pixels wide, are black.

    At least 95 % of the frame is black in 136 pairs of the Harvard atlas, at most 69 % in 115 infrared and visible
    ones (TNO, RoadScene, MSRS).
    """
    frame = np.ones(sources[0].size, bool)
    frame[3:-3, 3:-3] = False
    black = all((source.grey[frame] < 16).mean() > 0.9 for source in sources)
    return task_of(*map(Path, paths)) or ("mif" if black else "ivf")


def said(*lines: object) -> str:
    """Lines for the page; nothing in them is taken for HTML."""
    return "".join(f"<p>{html.escape(str(line))}</p>" for line in lines)


def explained(error: Exception) -> str:
    """An error in words for whoever uses the page; what it is not for them to know goes to the terminal."""
    text = str(error)
    if not isinstance(error, InputError):
        traceback.print_exception(error)
        memory = isinstance(error, MemoryError) or "out of memory" in text.lower()
        text = "has not enough memory for this pair" if memory else f"failed ({type(error).__name__})"
        text = f"The server {text}, which is not your images' fault; its terminal says more."
    return f"<div class=error role=alert>{said(text)}</div>"


def build(gr: ModuleType, desk: Desk) -> tuple[Any, Any]:
    """The page, a `gr.Blocks`, and its words, a `gr.I18n`: of the browser's language."""
    words = gr.I18n(**{code: {key: text[n] for key, text in WORDS.items()} for n, code in enumerate(("en", "zh"))})
    gr.set_static_paths([in_checkout("test_img").resolve()])
    samples = [
        (task, [str(path.resolve()) for path in (pair.vis, pair.ir)])
        for name, task in SAMPLE_SETS.items()
        for pair in list_pairs(*find_modalities(in_checkout("test_img", name))).pairs
    ]
    first_system = next(iter(desk.weights))

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
        return [task, first_system, False, False, *fit(task, first_system, *paths)]

    def preview(side: str, path: str | None, task: str) -> tuple:
        try:
            image = to_uint8(desk.read(path, f"{side}_{task}").shown) if path else None
        except Exception as error:
            return gr.Image(visible=False, value=None), explained(error)
        return gr.Image(image, visible=image is not None), gr.skip()

    def is_stale(done: list | None, *inputs: Any) -> Any:
        return gr.HTML(visible=done is not None and done != list(inputs))

    def fuse(asked, vis, ir, task, system, weights, colour, resized, spread, request: gr.Request) -> Iterator[dict]:
        def say(key: str, **values: Any) -> str:
            return WORDS[key][request.headers.get("accept-language", "").startswith("zh")].format(**values)

        inputs = [vis, ir, task, system, weights, colour, resized, spread]
        try:
            sources = [desk.read(vis, f"vis_{task}"), desk.read(ir, f"ir_{task}", spread)]
            advice = "tick the box that resizes where both show the same view, else crop or align one of them first"
            sources[1] = Registration(resized, advice=advice)(*sources)
            if asked != inputs and task_seen((vis, ir), sources) != task:
                yield {status: said(say(f"ask_{task}")), asked_for: inputs}
                return
            for step in desk.fuse(*sources, task, system, weights, colour):
                if isinstance(step, SimpleNamespace):
                    share = min(max(step.done / step.total, 1e-6), 0.99)
                    left = (time.monotonic() - step.started) * (1 - share) / share
                    key = "queued" if not step.started else "left" if share > 0.02 else "fusing"
                    yield {status: said(say(key, seconds=left)) + f"<progress value={share:.3f}></progress>"}
            fused, files, facts, maps, columns = step
            notes, table = [], ""
            # MRI and CT, PET or SPECT have too few edges in common for the check to mean anything.
            shift = edge_shift(sources[0].grey, sources[1].grey) if task == "ivf" else None
            if shift and shift.misaligned:
                notes.append(say("misaligned", shift=shift))
            names = [say("fused"), *(say("alone", role=say(f"{side}_{task}")) for side in SIDES), say("average")]
            try:
                table = desk.table(files[0], *sources, names, columns)
            except ValueError as error:
                notes.append(say("no_scores", error=error))
            shown = [(to_uint8(source.shown), to_uint8(fused)) for source in sources]
            yield {
                status: said(facts, *notes), results: gr.Column(visible=True), stale: gr.HTML(visible=False), done: inputs,
                sliders[0]: shown[0], sliders[1]: shown[1], features: maps, scores: table,
                downloads[0]: str(files[0]), downloads[1]: str(files[1]),
            }  # fmt: skip
        except Exception as error:  # nothing of an earlier pair stays beside the inputs of this one
            yield {status: explained(error), results: gr.Column(visible=False), done: None}

    with gr.Blocks(title="Image fusion", fill_width=True, analytics_enabled=False) as page:
        gr.Markdown("# Image fusion")
        gr.Markdown(words("about"))
        gr.Markdown(f"{words('limits')} {desk.args.max_pixels / 1e6:g} MP, {format_size(desk.args.max_upload)}.")
        gr.Markdown(words("start"))
        gallery = gr.Gallery(
            [paths[0] for _, paths in samples], show_label=False, columns=len(samples), height="auto",
            object_fit="cover", allow_preview=False, interactive=False, buttons=[], elem_id="samples",
        )  # fmt: skip
        done, asked_for, files, images, tabs, sliders = gr.State(), gr.State(), [], [], [], []
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                task = gr.Radio([(words(task), task) for task in TASKS], label=words("kind"), elem_id="task")
                with gr.Column(visible=False) as options:
                    with gr.Row():
                        for side in SIDES:
                            with gr.Column(min_width=150):
                                files.append(gr.File(height=110, elem_id=side))
                                images.append(gr.Image(visible=False, interactive=False, format="png", buttons=[]))
                    resized, spread = (gr.Checkbox(label=words(key), elem_id=key) for key in ("resize", "spread"))
                    colour = gr.Radio(value="both", label=words("colour"), elem_id="colour")
                    with gr.Row():
                        systems = [(find_system(name).label, name) for name in desk.weights]
                        system = gr.Dropdown(systems, value=first_system, label=words("system"), min_width=140)
                        weights = gr.Dropdown(label=words("weights"), min_width=190)
                    with gr.Row():
                        button = gr.Button(words("fuse"), variant="primary", elem_id="fuse")
                        cancel = gr.Button(words("cancel"), visible=False, elem_id="cancel")
            with gr.Column(scale=7, min_width=340):
                status = gr.HTML(words("nothing"), elem_id="status")
                with gr.Column(visible=False, elem_id="results") as results:
                    stale = gr.HTML(words("stale"), visible=False, elem_id="stale")
                    with gr.Tabs():
                        for _ in SIDES:
                            with gr.Tab() as tab:
                                sliders.append(gr.ImageSlider(format="png", interactive=False, show_label=False))
                            tabs.append(tab)
                        with gr.Tab(words("features")):
                            features = gr.Gallery(show_label=False, height="auto", format="png", elem_id="maps")
                    with gr.Row():
                        downloads = [gr.DownloadButton(words(key), elem_id=key) for key in ("download8", "download16")]
                    scores = gr.Markdown(elem_id="scores")
                    gr.Markdown(f"{words('scores')} {desk.args.protocol}.")

        inputs = [*files, task, system, weights, colour, resized, spread]
        outputs = [status, results, done, asked_for, stale, features, scores, *sliders, *downloads]
        fitted = [*files, options, colour, weights, *tabs]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        for side, file, image in zip(SIDES, files, images, strict=True):
            file.change(partial(preview, side), [file, task], [image, status], **quiet)
        gr.on([task.input, system.input], fit, [task, system], fitted, **quiet)
        gr.on([part.change for part in inputs], is_stale, [done, *inputs], stale, **quiet)
        picked = gallery.select(take_sample, None, [task, system, resized, spread, *fitted], **quiet)
        buttons, runs = [button, cancel], []
        busy, free = ([gr.Button(interactive=not on), gr.Button(visible=on)] for on in (True, False))
        for begin in (button.click, picked.then):
            begun = begin(lambda: busy, None, buttons, queue=False, **quiet)
            runs.append(begun.then(fuse, [asked_for, *inputs], outputs, **quiet))
            runs[-1].then(lambda: free, None, buttons, queue=False, **quiet)
        cancel.click(lambda: [*free, words("cancelled")], None, [*buttons, status], cancels=runs, queue=False, **quiet)
    return page, words


if __name__ == "__main__":
    sys.exit(main())
