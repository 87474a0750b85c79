"""Mode decode: the text of the answers in a result file."""

from getp.cli import loading
from getp.cli.settings import Settings
from getp.files import STDIO, check_writable


def run(settings: Settings) -> int:
    """Decode the file; return the exit status. Raises GetpError."""
    source = loading.needed(settings, settings.prompt.input, "-i/--input FILE")
    from getp.text.decode import decode_file

    output = settings.job.output or STDIO
    check_writable(output, "output", {"input": source})
    decode_file(source, output, loading.load_tokenizer(settings), settings.result_file.line)
    return 0
