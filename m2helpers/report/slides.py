"""The argument as slides: one HTML file without a network, its figures those of the executed notebooks and its numbers those of the records."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import UserError, read_json, write_text
from . import conclusions
from .gaps import gap_passage, recorded_gaps


@dataclass(frozen=True)
class Slide:
    """One slide."""

    title: str
    text: str
    """Markdown."""
    figure: str = ""
    """A diagram (``lora.svg``), or number and cell of a notebook (``6:before-after``)."""


def argument(base: str = "embedded") -> list[Slide]:
    """The slides in order."""
    return [
        Slide(
            "A language model that forecasts",
            "How well does a *small* language model forecast, how much better does a little fine-tuning make it, and what does each improvement cost?\n\n"
            "Results are those of the embedded base, a small model of Qwen2.5's architecture. → and ← turn the pages.",
            "pipeline.svg",
        ),
        Slide("The data", "Two populations a system. Most orbits spiral inward; some keep swinging; some predators fade.", "1:cell-12"),
        Slide("Numbers become text", "Scale, round, join, tokenise. One token a character; the scale belongs to the run.", "encoding.svg"),
        Slide("What a step costs", "Counted from the architecture, checked module by module against PyTorch's own counter.", "2:cell-17"),
        Slide("Before fine-tuning", "The base was pre-trained on synthetic series without any predator–prey system.", "3:cell-07"),
        Slide("LoRA", "The model stays frozen. Beside some of its matrices a product of two thin ones is trained; it begins at zero.", "lora.svg"),
        Slide("Where the backward pass stops", "Nothing below the first update is trained, so nothing flows back there.", "backward.svg"),
        Slide("How it is measured", "P5: a context of S tokens, five steps ahead, rounded like the truth, on test series alone.", "p5_window.svg"),
        Slide("Before and after", "Twenty futures of each run, on the same axes. The band holds the middle 80 %.", "6:before-after"),
        Slide("The answer", conclusions.answer(base)),
        Slide("Beside the baselines", "The ODE fit is told the law; nobody else is.", "6:cell-13"),
        Slide("What each FLOP bought", conclusions.bought(base)),
        Slide("Where it still fails", "One dot a window. An error of zero stands at the edge.", "6:cell-30"),
        Slide("Size is not importance", "The largest update can be taken away without loss; the head bias too.", "7:two-updates-code"),
        Slide("How far from the best possible", gap_passage(*recorded_gaps(base))),
        Slide("On Qwen2.5-0.5B itself", "Nothing of this was run; it follows from the architecture.\n\n" + conclusions.on_qwen()),
        Slide("What it rests on", conclusions.limits(base)),
    ]  # fmt: skip


def write_slides(slides: Sequence[Slide], notebooks: Path, diagrams: Path, path: Path) -> None:
    """Write slides as one page that needs no other file.

    Parameters
    ----------
    notebooks : Path
        Folder of the executed notebooks.
    diagrams : Path
        Folder of the diagrams.

    Raises
    ------
    UserError
        If a figure is not there.
    """
    from markdown_it import MarkdownIt  # comes with the site's own tools

    markdown = MarkdownIt("commonmark").enable("table")
    sections = []
    for slide in slides:
        figure = _figure(slide, notebooks, diagrams) if slide.figure else ""
        kind = "picture" if figure else "words"
        title = html.escape(slide.title)
        sections.append(
            f'<section class="{kind}" aria-label="{title}"><h1>{title}</h1><div>{markdown.render(slide.text)}</div>{figure}</section>'
        )
    write_text(path, _PAGE.replace("SECTIONS", "\n".join(sections)))


def _figure(slide: Slide, notebooks: Path, diagrams: Path) -> str:
    if slide.figure.endswith(".svg"):
        path = diagrams / slide.figure
        if not path.is_file():
            raise UserError(f"{path}: no such diagram, which the slide {slide.title!r} asks for")
        return _image(slide, "svg+xml", base64.b64encode(path.read_bytes()).decode())
    number, _, cell = slide.figure.partition(":")
    for path in notebooks.glob(f"{number}_*.ipynb"):
        for found in read_json(path)["cells"]:
            images = [o["data"]["image/png"] for o in found.get("outputs", []) if "image/png" in o.get("data", {})]
            if found.get("id") == cell and images:
                return _image(slide, "png", "".join(images[0]).replace("\n", ""))
    raise UserError(
        f"{notebooks}: no picture in cell {cell!r} of notebook {number}, which the slide {slide.title!r} asks for"
    )


def _image(slide: Slide, kind: str, data: str) -> str:
    return f'<figure><img class="{kind[:3]}" alt="{html.escape(slide.title)}" src="data:image/{kind};base64,{data}"></figure>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A language model that forecasts: slides</title>
<style>
:root { --ink: #1b1b1b; --paper: #fff; --faint: #6a6a6a; --line: #d0d0d0; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #eaeaea; --paper: #17191c; --faint: #a5a5a5; --line: #44484d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: clamp(15px, 1.7vw, 24px)/1.45 system-ui, sans-serif; }
section { display: none; height: 100vh; height: 100dvh; padding: 3vh 5vw 6vh; flex-direction: column; overflow: auto; }
section.on { display: flex; }
h1 { margin: 0 0 .4em; font-size: 1.7em; line-height: 1.2; }
section > div > :first-child { margin-top: 0; }
figure { flex: 1; min-height: 0; margin: 1vh 0 0; display: flex; justify-content: center; align-items: center; }
figure img { width: 100%; height: 100%; object-fit: contain; }
img.png { background: #fff; border-radius: 6px; padding: 6px; }
.words div { font-size: .92em; max-width: 70em; }
table { border-collapse: collapse; margin: .6em 0; }
td, th { border-bottom: 1px solid var(--line); padding: .25em .8em .25em 0; text-align: left; }
nav { position: fixed; right: 1.2vw; bottom: 1vh; display: flex; gap: .6em; align-items: center; color: var(--faint); font-size: 15px; }
nav button { font: inherit; color: inherit; background: none; border: 1px solid var(--line); border-radius: 6px; padding: .1em .7em; cursor: pointer; }
@media print { section { display: flex; break-after: page; } nav { display: none; } }
</style>
</head>
<body>
SECTIONS
<nav aria-label="slides"><button id="back" aria-label="previous slide">←</button><span id="where" aria-live="polite"></span><button id="on" aria-label="next slide">→</button></nav>
<script>
const slides = [...document.querySelectorAll("section")];
let at = Math.min(Math.max(parseInt(location.hash.slice(1)) - 1 || 0, 0), slides.length - 1);
function show(n) {
  at = Math.min(Math.max(n, 0), slides.length - 1);
  slides.forEach((slide, i) => slide.classList.toggle("on", i === at));
  document.getElementById("where").textContent = `${at + 1} / ${slides.length}`;
  history.replaceState(null, "", `#${at + 1}`);
}
const keys = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1, Home: -1e9, End: 1e9 };
addEventListener("keydown", event => {
  if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.tagName === "BUTTON") return;
  event.preventDefault();
  show(at + keys[event.key]);
});
document.getElementById("back").onclick = () => show(at - 1);
document.getElementById("on").onclick = () => show(at + 1);
let from = null;
addEventListener("touchstart", event => { from = event.touches[0].clientX; }, { passive: true });
addEventListener("touchend", event => {
  const far = event.changedTouches[0].clientX - from;
  if (Math.abs(far) > 60) show(at + (far < 0 ? 1 : -1));
});
addEventListener("hashchange", () => show(parseInt(location.hash.slice(1)) - 1 || 0));
show(at);
</script>
</body>
</html>
"""
