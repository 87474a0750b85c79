"""Coverage-guided fuzzing: `python -m tests.fuzz.atheris_runner TARGET FOLDER [-libFuzzer …]`.

Needs `pip install atheris`, which the tests do not. Runs the targets of `tests.fuzz.targets`
until `-max_total_time=SECONDS` or the first exception that is not one of getp's errors. Inputs that
reach new code are kept in FOLDER/corpus; the failing input is named at the end.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["getp", "tokenizer", "model", "jinja2"]):
    from tests.fuzz.targets import (
        TARGETS,
        Target,
        checkpoint_copy,
        header_of,
        index_of,
        safetensors_header,
        safetensors_index,
    )


def main() -> None:
    """Fuzz one target, starting from its valid file."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    work, corpus = folder / "work", folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    targets = dict(TARGETS)
    if name.startswith("safetensors"):
        from tests.checkpoints import write_checkpoint

        checkpoint_copy(write_checkpoint(folder / "checkpoint", "qwen2"), work)
        header = header_of(work)
        targets["safetensors-header"] = Target(header, safetensors_header)
        targets["safetensors-index"] = Target(index_of(header), safetensors_index)
    work.mkdir(exist_ok=True)
    target = targets[name]
    (corpus / "valid").write_bytes(target.valid)
    limits = ["-timeout=120", "-rss_limit_mb=4096", "-max_len=65536"]
    arguments = [sys.argv[0], str(corpus), *limits, f"-artifact_prefix={folder}/", *sys.argv[3:]]
    atheris.Setup(arguments, lambda data: target.use(work, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
