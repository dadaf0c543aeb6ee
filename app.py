"""A page in the browser: two images in, or a bundled sample; fused image, features, scores and a download out.

python app.py                                                # then open http://127.0.0.1:7860
python app.py --weights runs/cddfuse_ivf/CDDFuse_IVF.pth model_fuse.pth    # to choose from, beside those in models/
python app.py --host 0.0.0.0 --max-pixels 2e6 --max-memory 4GB             # for others on the network, too

Needs `pip install gradio`. Nothing is fetched from elsewhere: the page works offline, and sends nothing home.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.common import InputError, run_script, sigterm_as_ctrl_c
from utils.inference.fusing import add_inference_options, keep_freed_memory, pick_device, pick_precision
from utils.metrics import PROTOCOLS

if TYPE_CHECKING:
    from utils.page import Desk

PORTS = range(7860, 7960)  # the first free one is taken
KEPT = (600, 3600)  # seconds: how often is looked for files to remove, and from which age on they are removed
WAITING = 32  # users in the queue; a further one is told that it is full

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
.said {padding: 10px 14px; border-radius: 6px; overflow-wrap: anywhere; background: var(--background-fill-secondary)}
.said p {margin: 0 0 4px}
.said .error {font-weight: 600; color: var(--error-text-color, #b91c1c)}
.pictures .grid-wrap {height: auto; min-height: 0; max-height: none; overflow: visible; padding: 6px}
.pictures .grid-container, .pictures .gallery-item {height: auto; min-height: 0}
.pictures .grid-container {grid-template-rows: none; grid-auto-rows: min-content}
#status .html-container {padding: 0}
#samples .thumbnail-item {aspect-ratio: 5 / 2; height: auto; border-radius: 4px}
#maps .thumbnail-item {aspect-ratio: 4 / 3; height: auto}
.upload .icon-wrap, .upload td.download {display: none}
.upload {min-height: 0}
#scores table {width: 100%; font-size: 0.93em}
#scores td, #scores th {padding: 3px 8px; text-align: right; white-space: nowrap}
#scores td, #scores th {border-color: var(--border-color-primary) !important}
#scores tr > :first-child {text-align: left} #scores tr > :last-child {text-align: left; white-space: normal}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only")
    add("--port", type=int, help=f"default: {PORTS[0]}, or the next free one; 0: any free one")
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE", help="to choose from, beside those in models/")
    add("--max-pixels", type=whole_number, default=4_000_000, metavar="N", help="of an image (default: 4e6)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="of the scores (default: paper)")
    add_inference_options(parser)
    add("--debug", action="store_true", help="show tracebacks")
    return run_script(serve, parser.parse_args(argv))


def whole_number(text: str) -> int:
    """A positive whole number, also as 4e6; a type for argparse.

    >>> whole_number("4e6")
    4000000
    """
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pixels; write 4000000 or 4e6")
    return number


def serve(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C or SIGTERM; uploads and results are then removed."""
    port = free_port(args.host, args.port)
    device = pick_device(args.device)
    # OpenCV reads this when it is imported, hence now: it bounds also what `size_in_header` knows no size of. The
    # bundled samples have to pass.
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max(args.max_pixels, 10**6))
    from utils.page import Desk, Limits, weights_by_system

    keep_freed_memory()
    # Before SIGTERM means Ctrl-C there is nothing to remove.
    with sigterm_as_ctrl_c(), tempfile.TemporaryDirectory(prefix="fusion-page-", ignore_cleanup_errors=True) as folder:
        gr = import_gradio(folder)
        desk = Desk(
            folder=Path(folder),
            weights=weights_by_system(args.weights, device),
            limits=Limits(args.max_pixels),
            protocol=args.protocol,
            device=device,
            precision=pick_precision(args.precision, device),
            max_memory=args.max_memory,
            scratch=args.scratch,
        )
        page = build(gr, desk)
        try:
            launch(gr, page, desk, args.host, port)
            print(f"http://{args.host}:{port} (Ctrl-C ends it)", flush=True)
            if args.host not in ("127.0.0.1", "localhost", "::1"):
                print("warning: everybody who reaches this address can use the page", file=sys.stderr, flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended")
        finally:
            page.close(verbose=False)
    return 0


def free_port(host: str, port: int | None) -> int:
    """The port asked for, or the first free one.

    Raises:
        InputError: it is taken, or there is no such address here.
    """
    reason = ""
    for candidate in PORTS if port is None else [port]:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
                return probe.getsockname()[1]
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    where = f"{PORTS[0]} to {PORTS[-1]}" if port is None else port
    raise InputError(f"cannot listen on {host}, port {where} ({reason}); name others with --host and --port")


def import_gradio(folder: str) -> ModuleType:
    """Gradio, with its files in a folder of ours, and set up by this script alone.

    Raises:
        InputError: it is not installed.
    """
    # Variables such as GRADIO_SHARE or GRADIO_ALLOWED_PATHS would open what nobody asked this script to open.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    # It asks itself whether it answers, which must not go through a proxy.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost,127.0.0.1")))
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the page needs Gradio ({error}); run: pip install gradio") from error
    return gradio


def upload_field(gr: ModuleType, **settings: Any) -> Any:
    """A gr.File, changed in what it takes and what it hands on.

    A file, not gr.Image: that one decodes and encodes again, which loses 16 bits and turns by EXIF in its own way.
    What comes here is the file as it was, and our reader is the only one.
    """
    from utils.page import Upload, safe_name

    field = gr.File(**settings)
    move = field.async_move_resource_to_block_cache

    async def move_local(path: Any) -> str | None:
        if not is_local(str(path)):  # Gradio would fetch it
            raise gr.Error("upload a file; addresses are not fetched")
        return await move(path)

    def preprocess(payload: Any) -> Upload | None:
        if payload is None:
            return None
        return Upload(Path(payload.path), safe_name(payload.orig_name or Path(payload.path).name))

    # Not in a subclass: for each of those Gradio writes a stub, app.pyi, into the checkout.
    field.async_move_resource_to_block_cache, field.preprocess = move_local, preprocess
    return field


def is_local(path: str) -> bool:
    """
    >>> is_local("/tmp/a.png"), is_local(" HTTP://other.example/a.png")
    (True, False)
    """
    return not re.match(r"\s*[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE)


class NoForeignAddresses:
    """ASGI middleware: Gradio's routes for files would pass on what is at an address elsewhere; here they do not."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        asked = re.search(r"/(?:file|proxy)[=/](.*)", scope.get("path", ""), re.DOTALL)
        if not asked or is_local(asked[1]):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"addresses are not fetched"})


def build(gr: ModuleType, desk: Desk) -> Any:
    """The page: a `gr.Blocks`. All that it shows or does is asked of the desk."""
    from utils.page import COLOUR_NAMES, bundled_samples, copy_to, score_table, size_of, system_names, task_names

    samples = bundled_samples()
    first = next(iter(desk.weights))

    def preview(place: int, upload: Any, task: str) -> tuple[Any, Any]:
        if upload is None:
            return gr.Image(visible=False, value=None), gr.skip()
        try:
            shown = desk.preview(upload, task, place)
        except Exception as error:
            return gr.Image(visible=False, value=None), said(explained(error), error=True)
        return gr.Image(shown, visible=True, label=f"{size_of(shown)}, as read"), gr.skip()

    def take_sample(event: Any) -> list[Any]:
        sample = samples[event.index]
        files = [str(copy_to(desk.folder, upload)) for upload in (sample.vis, sample.ir)]
        return [*files, sample.task, first, offer_weights(first, sample.task), False]

    take_sample.__annotations__["event"] = gr.SelectData  # how Gradio knows; the name is none of this module

    def offer_weights(system: str, task: str) -> Any:
        return gr.Dropdown(choices=list(desk.weights[system]), value=desk.default_weights(system, task))

    def fuse(vis: Any, ir: Any, task: str, system: str, weights: str, colour: str, resize: bool) -> list[Any]:
        try:
            result = desk.fuse(vis, ir, task=task, system=system, weights=weights, colour=colour, resize_ir=resize)
        except Exception as error:
            # Nothing of an earlier pair stays beside the inputs of this one.
            return [said(explained(error), error=True), gr.Column(visible=False), None, None, [], "", None]
        features = [(image, name) for name, image in result.features.items()]
        return [
            said(result.facts, *result.notes),
            gr.Column(visible=True),
            (result.vis, result.fused),
            (result.ir, result.fused),
            features,
            score_table(result, desk.protocol),
            gr.DownloadButton(value=str(result.file), label=f"Download {result.file.name}"),
        ]

    with gr.Blocks(title="Image fusion", fill_width=True, analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown(
            "# Image fusion\nOne image from two sensors: infrared and visible light, or MRI and CT, PET or SPECT. "
            f"**Each image up to {desk.limits}**; PNG, JPEG, BMP, TIFF or portable anymap, 8 or 16 bits. "
            f"Pairs are fused one at a time, in the order they came; files are removed after {KEPT[1] // 60} minutes."
        )
        gr.Markdown("Click a bundled sample, or choose two images of your own below.")
        gallery = gr.Gallery(
            [sample.thumbnail() for sample in samples], show_label=False, columns=len(samples), height="auto",
            object_fit="contain", allow_preview=False, interactive=False, buttons=[], format="png",
            elem_id="samples", elem_classes="pictures",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                task = gr.Radio(task_names(), value="ivf", label="Kind of images")
                with gr.Row():
                    files, shown_files = [], []
                    for name, place in (("Visible, MRI", "vis"), ("Infrared, CT, PET, SPECT", "ir")):
                        with gr.Column(min_width=160):
                            files.append(upload_field(gr, label=name, height=110, elem_id=place, elem_classes="upload"))
                            shown_files.append(
                                gr.Image(height=190, visible=False, interactive=False, format="png", buttons=[])
                            )
                resize = gr.Checkbox(
                    label="Resize: stretch the infrared (CT, PET, SPECT) image to the size of the other",
                    elem_id="resize",
                )
                colour = gr.Radio(COLOUR_NAMES, value="both", label="Colours of the fused image", elem_id="colour")
                with gr.Row():
                    system_choice = gr.Dropdown(system_names(desk.weights), value=first, label="System", min_width=140)
                    weights = gr.Dropdown(
                        list(desk.weights[first]), value=desk.default_weights(first, "ivf"), label="Weights",
                        min_width=200,
                    )  # fmt: skip
            with gr.Column(scale=7, min_width=480):
                button = gr.Button("Fuse", variant="primary", elem_id="fuse")
                status = gr.HTML(said("Nothing fused yet."), elem_id="status", padding=False)
                with gr.Column(visible=False) as results:
                    sliders = []
                    with gr.Tabs():
                        for name in ("visible, MRI", "infrared, CT, PET, SPECT"):
                            with gr.Tab(f"Against {name}"):
                                sliders.append(
                                    gr.ImageSlider(
                                        label=f"Left: {name}; right: fused",
                                        format="png",
                                        interactive=False,
                                        buttons=["fullscreen"],
                                        max_height=400,
                                    )  # fmt: skip
                                )
                        with gr.Tab("Features"):
                            features = gr.Gallery(
                                show_label=False, columns=2, height="auto", object_fit="contain", interactive=False,
                                buttons=["fullscreen"], format="png", elem_id="maps", elem_classes="pictures",
                            )  # fmt: skip
                    download = gr.DownloadButton("Download", variant="primary", elem_id="download")
                    table = gr.Markdown(elem_id="scores")
                    gr.Markdown(
                        f"Scores of the file as downloaded, protocol `{desk.protocol}`. Copying a source is unbeatable "
                        "in MI and VIF: the columns of a source alone are there to compare with, not to win."
                    )

        settings = [*files, task, system_choice, weights, colour, resize]
        shown = [status, results, *sliders, features, table, download]
        private: dict[str, Any] = {"api_visibility": "private"}
        fusing = private | {"concurrency_limit": 1, "concurrency_id": "fuse", "show_progress_on": [status]}
        for place, (file, image) in enumerate(zip(files, shown_files, strict=True)):
            file.change(partial(preview, place), [file, task], [image, status], **private)
        for choice in (task, system_choice):
            choice.input(offer_weights, [system_choice, task], weights, **private)
        button.click(fuse, settings, shown, **fusing)
        taken = gallery.select(take_sample, None, [*files, task, system_choice, weights, resize], **private)
        taken.then(fuse, settings, shown, **fusing)
    return page


def said(first: str, *more: str, error: bool = False) -> str:
    """Lines for the page; nothing in them is taken for HTML."""
    lines = "".join(f"<p{' class=error' if error else ''}>{html.escape(line)}</p>" for line in (first, *more))
    return f'<div class="said" role="{"alert" if error else "status"}">{lines}</div>'


def explained(error: Exception) -> str:
    """An error in words for whoever uses the page; what it is not for them to know goes to the terminal."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "the server has not enough memory for this pair; reduce the images, or try again later"
    if isinstance(error, OSError):
        return f"the server could not read or write a file ({error.strerror or type(error).__name__})"
    return f"the server failed ({type(error).__name__}), which is not your images' fault; its terminal says more"


def launch(gr: ModuleType, page: Any, desk: Desk, host: str, port: int) -> None:
    from starlette.middleware import Middleware  # comes with Gradio

    page.queue(max_size=WAITING, api_open=False)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=gr.themes.Default(**fonts),
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        max_file_size=desk.limits.file_bytes,
        app_kwargs={"middleware": [Middleware(NoForeignAddresses)]},
    )


if __name__ == "__main__":
    sys.exit(main())
