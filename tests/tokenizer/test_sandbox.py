"""A chat template can do no more than fail: not hang, take memory, or outlive its job."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenizer import ChatTemplate, TemplateError, sandbox
from tokenizer.chat import _sandbox

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "hi"}]
HANGS = "{{ (messages | length) | round(30000000, 'floor') }}"
GREETING = ChatTemplate("{{ messages[0].content }}, {{ name }}!")


def assert_works(name: str = "you") -> None:
    assert GREETING.render(MESSAGES, {"name": name}) == f"hi, {name}!"


def worker() -> int:
    assert_works()
    assert _sandbox._process is not None
    return _sandbox._process.pid


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    "template",
    [
        HANGS,
        "{{ 'x'.encode().ljust(3000000000) | length }}",
        "{{ ([range(99999)] * 2000000) | map('sum') | sum }}",
        "{% set big = 'x' * 16000000 %}{% set ns = namespace(a=none) %}{% for i in range(99999) %}"
        "{% set ns.a = namespace(p=ns.a, t=big | upper) %}{% endfor %}ok",
        "{{ (range(99999) | select('in', range(99999) | list) | list) | length }}",
        "{{ ('x' * 16000000).encode().replace('x'.encode(), ('y' * 100).encode()) | length }}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{% set x = 999999999 * [1] %}",
        "{{ 99 ** 99999999 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'x\\ny' | indent(999999999) }}",
        "{{ lipsum(999999) }}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% endfor %}{{ n.x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(70000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ raise_exception('x' * 99999999) }}",
    ],
)
def test_a_template_that_takes_too_much_fails_alone(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_works()
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(TemplateError, match="the chat template failed: ") as caught:
        ChatTemplate(template).render(MESSAGES)
    assert len(str(caught.value)) < 1100
    assert time.monotonic() - start < 8
    assert_works()


def test_errors_name_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", 2.0)
    for template, message in {
        HANGS: "it takes more than 2 seconds",
        "{{ 'x'.encode().ljust(3000000000) }}": "it needs more than 512 MiB of memory",
        "{% for i in range(90000) %}{{ 'x' * 999 }}{% endfor %}": "more than 16777216 characters",
        "{{ range(999999999) }}": "Range too big",
    }.items():
        with pytest.raises(TemplateError, match=message):
            ChatTemplate(template).render(MESSAGES)


def test_long_conversations_and_results_fit_the_limits() -> None:
    text = "🙂" * (16 << 20)
    rendered = ChatTemplate("{{ messages[0].content | trim }}").render([{"content": text}])
    assert rendered == text


def test_what_jinja_offers_is_available() -> None:
    for template, text in {
        "{% for x in [1, [2]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}": "12",
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}": "1",
        "{% generation %}a{% endgeneration %}{{ ['<é>'] | tojson }}": 'a["<é>"]',
        "{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a ~ n.a }}": "22",
        "{{ 'a b' | wordwrap(1) }}{{ '%03d' % 7 }}{{ 'a'.translate({97: 'b'}) }}": "a\nb007b",
    }.items():
        assert ChatTemplate(template).render(MESSAGES) == text


def test_the_process_is_small_and_private(tmp_path: Path) -> None:
    with open(tmp_path / "open", "wb") as file:
        os.set_inheritable(file.fileno(), True)
        _sandbox._stop()
        pid = worker()
    files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert sorted(file.split(":")[0] for file in files) == ["/dev/null", *["socket"] * 3]
    assert "tokenizers" not in Path(f"/proc/{pid}/maps").read_text()
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    limit, _ = resource.prlimit(pid, resource.RLIMIT_AS)
    assert 0 < limit - used <= sandbox._MAX_MEMORY
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGINT)
    assert worker() == pid


def test_a_process_that_was_killed_is_replaced_and_leaves_no_zombie() -> None:
    pid = worker()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: has_ended(pid))
    assert worker() != pid
    assert not Path(f"/proc/{pid}").exists()


def test_data_that_arrives_during_a_rendering_does_not_end_it() -> None:
    """The system's signal that a request has arrived can be later than the request."""
    loop = "{% for i in range(99999) %}{% endfor %}"
    slow = loop * 20 + "ok"
    worker()
    timer = threading.Timer(0.02, _sandbox._socket.sendall, [b"\0"])
    timer.start()
    try:
        assert ChatTemplate(slow).render(MESSAGES) == "ok"
        assert timer.finished.is_set()
    finally:
        timer.join()
        _sandbox.close()


def test_threads_share_the_process() -> None:
    failures: list[BaseException] = []

    def render(number: int) -> None:
        try:
            for i in range(50):
                name = "x" * (i * 1000) + str(number)
                assert_works(name)
                with pytest.raises(TemplateError, match=name[-40:]):
                    ChatTemplate("{{ raise_exception(name[-40:]) }}").render([], {"name": name})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_a_forked_process_starts_its_own() -> None:
    pid = worker()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            status = int(worker() == pid)
            _sandbox._stop()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert worker() == pid


_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off
from tokenizer import ChatTemplate
from tokenizer.chat import _sandbox
assert "jinja2" not in sys.modules and _sandbox._process is None
ChatTemplate("x").render([])
print(_sandbox._process.pid, flush=True)
ChatTemplate({template!r}).render([1])
"""


@pytest.mark.parametrize("template", [HANGS, "x"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_a_rendering_and_its_process(template: str, number: int) -> None:
    code = _PROGRAM.format(template=template) + "input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.3)  # until it renders
    assert not has_ended(pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == -number
    assert errors == "" or errors.endswith("KeyboardInterrupt\n")
    wait_until(lambda: has_ended(pid), 2)


def test_the_end_of_the_program_is_the_end_of_the_process() -> None:
    code = _PROGRAM.format(template="x")
    run = [sys.executable, "-X", "dev", "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/bin/true", "/nothing"):
        _sandbox._stop()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", program)
            with pytest.raises(TemplateError, match=f"did not start .* {program} can import"):
                assert_works()
    assert_works()


def test_rendering_takes_less_than_a_millisecond() -> None:
    messages = [{"role": "user", "content": "What is 17 plus 25? " * 20}] * 9
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    times = []
    for _ in range(200):
        start = time.perf_counter()
        template.render(messages)
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 1e-3
