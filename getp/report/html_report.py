"""The report of a job as one HTML page without any other file. Needs matplotlib for its figures."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from getp.errors import GetpError
from getp.files import open_output
from getp.report.history import Moment
from getp.report.job_report import Report
from getp.report.measurements import Measurements
from getp.report.report_table import report_rows
from getp.terminal import strip_control_characters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIX = ".html"

_TEMPLATE = Path(__file__).with_name("report.html")
# Of Okabe and Ito, distinct for colour-blind readers, legible on white and on black.
_BLUE, _ORANGE, _GREEN, _GREY = "#2A8BD0", "#D9730D", "#009E73", "#888888"


def check_html(path: str) -> None:
    """Raise GetpError now if an HTML report could not be drawn later."""
    if not path.endswith(SUFFIX):
        return
    try:
        import matplotlib  # noqa: F401 - checks that it is installed
    except ImportError:
        raise GetpError(
            "an HTML report needs matplotlib: pip install '{package}', or write {report} as .json",
            package="getp[plot]",
        ) from None


def write_html(path: str, report: Report, measured: Measurements) -> None:
    """Write the page. Raises GetpError if the file cannot be written."""
    figures = [
        (title, _figure(draw)) for title, draw in _figures(report, measured) if draw is not None
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"getp on {strip_control_characters(report['checkpoint'])}",
        rows=report_rows(report, details=True),
        figures=figures,
        # "</" could end the script element that holds the data.
        data=json.dumps(report).replace("</", "<\\/"),
    )
    with open_output(path) as file:
        file.write(page.encode("utf-8", "replace"))


def _figures(
    report: Report, measured: Measurements
) -> list[tuple[str, Callable[["Axes"], None] | None]]:
    """Return the title of each figure and what draws it; None if there is nothing to show."""
    moments = measured.history.moments()

    def course(draw: Callable[["Axes", Sequence[Moment]], None]) -> Callable[["Axes"], None] | None:
        return (lambda axes: draw(axes, moments)) if moments else None

    def latency(values: Sequence[float]) -> Callable[["Axes"], None] | None:
        return (lambda axes: _draw_latency(axes, values)) if values else None

    has_roof = bool(report["peak_flops"] and report["mfu"] and report["mbu"])
    return [
        ("Throughput", course(_draw_throughput)),
        ("Requests", course(_draw_requests)),
        ("KV cache", course(_draw_kv)),
        ("Time to first token", latency(measured.ttft_s.values)),
        ("Time per output token", latency(measured.per_token_s.values)),
        ("Roofline", (lambda axes: _draw_roofline(axes, report)) if has_roof else None),
    ]


def _figure(draw: Callable[["Axes"], None]) -> str:
    """Return a drawing as an SVG element, with text in the colour and font of the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The same salt gives the same ids, so equal reports have equal bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "getp", "font.size": 11}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.grid(color=_GREY, alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    element = text[text.index("<svg") :]
    # Black is text and axes: the page decides their colour, which is white in its dark form.
    for black in ("#000000", "black"):
        element = element.replace(f"stroke: {black}", "stroke: currentColor")
        element = element.replace(f"fill: {black}", "fill: currentColor")
    return element.replace("<text", '<text fill="currentColor"')


def _draw_throughput(axes: "Axes", moments: Sequence[Moment]) -> None:
    output = [each.output_tok_s for each in moments]
    prompt = [each.prompt_tok_s for each in moments]
    _draw_courses(axes, moments, "tokens per second", {"output": output, "prompt": prompt})


def _draw_requests(axes: "Axes", moments: Sequence[Moment]) -> None:
    running, waiting = [each.running for each in moments], [each.waiting for each in moments]
    _draw_courses(axes, moments, "requests", {"running": running, "waiting": waiting})


def _draw_courses(
    axes: "Axes", moments: Sequence[Moment], unit: str, courses: Mapping[str, Sequence[float]]
) -> None:
    """Draw two values over time, by their names."""
    times = [each.seconds for each in moments]
    for (name, values), colour, style in zip(
        courses.items(), (_BLUE, _ORANGE), ("-", "--"), strict=True
    ):
        axes.plot(times, values, color=colour, label=name, linestyle=style)
    axes.set(xlabel="seconds", ylabel=unit, xlim=(0, None), ylim=(0, None))
    _legend(axes)


def _draw_kv(axes: "Axes", moments: Sequence[Moment]) -> None:
    shares = [100 * each.kv_use for each in moments]
    axes.fill_between([each.seconds for each in moments], shares, color=_GREEN, alpha=0.4)
    axes.set(xlabel="seconds", ylabel="% of blocks in use", xlim=(0, None), ylim=(0, 100))


def _draw_latency(axes: "Axes", values: Sequence[float]) -> None:
    ordered = sorted(values)
    shares = [100 * (rank + 1) / len(ordered) for rank in range(len(ordered))]
    axes.step(ordered, shares, color=_BLUE, where="post")
    axes.set(xlabel="seconds", ylabel="% of requests", ylim=(0, 102), xlim=(0, None))


def _draw_roofline(axes: "Axes", report: Report) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    peak, bandwidth = report["peak_flops"], report["bandwidth"]
    speed = report["mfu"] * peak
    intensity = speed / (report["mbu"] * bandwidth)
    ridge = peak / bandwidth
    low, high = min(intensity, ridge) / 10, max(intensity, ridge) * 10
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color=_GREY, label="limit")
    axes.plot([intensity], [speed], "o", color=_ORANGE, label="this run")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    _legend(axes)


def _legend(axes: "Axes") -> None:
    axes.legend(frameon=False, fontsize=10, labelcolor="#000000")
