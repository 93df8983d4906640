"""Run an exported ONNX graph in a real browser and compare its logits with those of the Python engine.

    npm install onnxruntime-web                                       # in any folder; Debian's package chromium
    python benchmarks/browser/run.py DIR --ort node_modules/onnxruntime-web/dist --prompt "The capital of France is"

DIR is what ``mobillama export onnx`` made. A server on 127.0.0.1 hands out the page, the graph and the runtime; a headless
Chromium opens it, decodes greedily and posts its logits. The server sets the two headers without which a browser gives a
page no threads (cross-origin isolation); any server of the page must.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from mobillama.data.tokenizer import decode
from mobillama.engine.load import load_engine
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "browser.json"
KINDS = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}


class Handler(BaseHTTPRequestHandler):
    """Hands out the files of three places, and takes the result."""

    def __init__(self, places: dict[str, Path], task: bytes, results: queue.Queue[Any], *rest: Any) -> None:
        self.places, self.task, self.results = places, task, results
        super().__init__(*rest)

    def do_GET(self) -> None:
        """Answer with a file."""
        folder, _, name = self.path.lstrip("/").rpartition("/")
        file = self.places.get(folder, Path("/nowhere")) / (name or "index.html")
        if self.path == "/task.json":
            self.answer(self.task, ".json")
        elif file.is_file():
            self.answer(file.read_bytes(), file.suffix)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        """Take the result."""
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(b"{}", ".json")

    def answer(self, content: bytes, suffix: str) -> None:
        """Send bytes with the headers of an isolated page."""
        self.send_response(200)
        self.send_header("Content-Type", KINDS.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content)

    def log_message(self, *unused: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(places: dict[str, Path], task: dict[str, Any]) -> Iterator[tuple[str, queue.Queue[Any]]]:
    """Serve on loopback; yield the address and where results arrive."""
    results: queue.Queue[Any] = queue.Queue()
    handler = functools.partial(Handler, places, json.dumps(task).encode(), results)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", results
        server.shutdown()


def main() -> None:
    """Decode in the browser, then feed the same tokens to the Python engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ort", type=Path, required=True, help="onnxruntime-web's dist folder")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--limit", type=int, default=300, help="seconds to wait")
    parser.add_argument("--remark", default="", help="what readers must know")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    engine, tokenizer = load_engine(args.model)
    (ids,) = tokenizer.encode([args.prompt])
    places = {"": HERE, "ort": args.ort, "model": args.model}
    with (
        served(places, {"ids": ids, "tokens": args.tokens, "threads": args.threads}) as (address, results),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [args.browser, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            result = results.get(timeout=args.limit)
        finally:
            browser.terminate()
            browser.wait()
    if "error" in result:
        raise SystemExit(f"the browser says: {result['error']}")
    errors, agree = [], 0
    ours = engine.feed(ids)
    for step in result["steps"]:
        theirs = np.array(step["logits"], np.float32)
        errors.append(float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)))
        agree += int(ours.argmax()) == step["token"]
        ours = engine.feed([step["token"]])
    tokens = [step["token"] for step in result["steps"]]
    facts = {
        "prompt": args.prompt,
        "text": decode(tokenizer, tokens),
        "tokens": len(tokens),
        "relative_logit_error": {"median": float(np.median(errors)), "most": max(errors)},
        "same_likeliest_token": agree,
        "load_seconds": result["loadSeconds"],
        "prefill_tokens_per_second": len(ids) / result["prefillSeconds"],
        "decode_tokens_per_second": len(tokens) / result["decodeSeconds"],
        "threads": args.threads if result["isolated"] else 1,
        "browser": result["agent"],
        "remark": args.remark,
        "runtime": "onnxruntime-web " + json.loads((args.ort.parent / "package.json").read_text())["version"],
        "environment": environment(),
    }
    results = read_json(args.out) if args.out.exists() else {}
    write_json(args.out, results | {args.model.name: facts})
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
