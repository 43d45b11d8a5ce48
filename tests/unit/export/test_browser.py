"""ONNX Runtime in a real browser: it opens the files and answers as in Python.

KDCOMPRESS_TEST_BROWSER names a Chromium, KDCOMPRESS_TEST_ORT_WEB the `dist` folder of the npm package onnxruntime-web;
without them the tests are skipped.
"""

import json
import os
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from kdcompress.bundle import Bundle, Interface
from kdcompress.export import change_interface
from kdcompress.profiles import get_profile
from kdcompress.quantize import find_quantizer
from tests.unit.deployed import digits, onnx_bundle

IMAGES = 40
PAGE = """<!doctype html><meta charset="utf-8"><script src="/ort.all.min.js"></script><script>
async function answer() {
  ort.env.wasm.wasmPaths = "/"; ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create("/model.onnx", {executionProviders: ["wasm"]});
  const {type, dims, values} = await (await fetch("/images.json")).json();
  const data = type == "uint8" ? new Uint8Array(values) : new Float32Array(values);
  const out = await session.run({[session.inputNames[0]]: new ort.Tensor(type, data, dims)});
  return {inputs: session.inputNames, outputs: session.outputNames, values: [...out[session.outputNames[0]].data]};
}
answer().catch(error => ({error: String(error)})).then(
  found => fetch("/found", {method: "POST", body: JSON.stringify(found)}));
</script>"""


def named_by(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path or not Path(path).exists():
        pytest.skip(f"{variable} names nothing")
    return Path(path)


class Server(ThreadingHTTPServer):
    """Serves the page, what it asks for, and takes what it found."""

    def __init__(self, files: dict[str, bytes], folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.files = files
        self.found: dict[str, Any] = {}
        self.done = threading.Event()


class Handler(SimpleHTTPRequestHandler):
    server: Server
    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


def in_browser(model: Path, images: NDArray[Any], profile_folder: Path) -> dict[str, Any]:
    """What a page finds that runs the model on the images."""
    browser, dist = named_by("KDCOMPRESS_TEST_BROWSER"), named_by("KDCOMPRESS_TEST_ORT_WEB")
    tensor = {"type": str(images.dtype), "dims": images.shape, "values": images.ravel().tolist()}
    files = {"/": PAGE.encode(), "/model.onnx": model.read_bytes(), "/images.json": json.dumps(tensor).encode()}
    with Server(files, dist) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        line += ["--remote-debugging-port=0", f"--user-data-dir={profile_folder}"]
        process = subprocess.Popen(
            [*line, f"http://127.0.0.1:{server.server_port}/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert server.done.wait(120), "the page has said nothing"
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()
    return server.found


def int8(folder: Path) -> Bundle:
    quantizer = find_quantizer("int8")
    return quantizer.run(onnx_bundle(), digits()[0][:200], folder, profile=get_profile("ort-x86"))


def camera(folder: Path) -> Bundle:
    interface = Interface("uint8-nhwc", "probabilities", None)
    return change_interface(onnx_bundle(), folder, interface, images=digits()[0][:40])


def fp16(folder: Path) -> Bundle:
    return find_quantizer("fp16").run(onnx_bundle(), digits()[0][:40], folder, profile=get_profile("ort-x86"))


@pytest.fixture(params=["fp32", "fp16", "int8", "camera"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    named_by("KDCOMPRESS_TEST_BROWSER")
    made = {"fp32": lambda _: onnx_bundle(), "fp16": fp16, "int8": int8, "camera": camera}
    return made[request.param](tmp_path / "bundle")


def test_a_browser_answers_as_python_does(bundle: Bundle, tmp_path: Path) -> None:
    images = digits()[0][-IMAGES:].numpy()
    if bundle.interface.input == "uint8-nhwc":
        images = np.rint(images.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    session = onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"images": images})
    found = in_browser(bundle.model_path, images, tmp_path / "profile")
    assert "error" not in found, found
    assert (found["inputs"], found["outputs"]) == (["images"], [session.get_outputs()[0].name])
    values = np.array(found["values"]).reshape(expected.shape)
    tolerance = 0.1 if bundle.precision == "int8" else 1e-3
    assert np.abs(values - expected).max() <= tolerance * np.abs(expected).max()
    assert (values.argmax(1) == expected.argmax(1)).mean() >= (0.95 if bundle.precision == "int8" else 1.0)
