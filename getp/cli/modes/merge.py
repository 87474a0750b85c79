"""Mode merge: the results of a job's shards as one file."""

from getp.cli import loading
from getp.cli.settings import Settings
from getp.files import check_writable
from getp.terminal import print_message


def run(settings: Settings) -> int:
    """Join the shards; return the exit status. Raises GetpError."""
    output = loading.needed(settings, settings.job.output, "-o/--output FILE")
    from getp.job.results import merge_shards

    check_writable(output, "output")
    print_message(f"getp: joined {merge_shards(output)} shards in {output}")
    return 0
