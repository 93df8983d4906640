"""Draw docs/pictures/serve-page.png: the page in a headless Chromium, in a conversation with a model that is served.

    PYTHONPATH=src python tools/picture_page.py SmolLM2-135M-Instruct.Q4_1.gguf

Answers are the likeliest tokens; the speeds beside them are those of the machine at that moment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from browser import browser  # noqa: E402
from serve_support import serving  # noqa: E402

PICTURE = ROOT / "docs" / "pictures" / "serve-page.png"
QUESTIONS = ("What is a glacier?", "Write three sentences about the moon.", "What are three tips for staying healthy?")


def main() -> None:
    """Serve, ask and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file or a model directory with a chat template")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    with serving(args.model) as address, browser() as page:
        page.open(address, width=1360)
        page.wait("model !== null")
        page.run("at('sampling').elements.temperature.value = 0; at('sampling').elements.max_tokens.value = 60")
        page.run("at('sampling').dispatchEvent(new Event('input', { bubbles: true }))")
        for number, question in enumerate(QUESTIONS, 1):
            page.run("document.getElementById('text').focus()")
            page.type(question)
            page.press("Enter", "\r")
            page.wait(f"messages.length === {2 * number} && !busy")
        page.screenshot(args.out)


if __name__ == "__main__":
    main()
