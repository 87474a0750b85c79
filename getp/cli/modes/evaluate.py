"""Mode eval: a result file against a reference, expected texts or both."""

from getp.cli import loading
from getp.cli.settings import Settings
from getp.errors import UsageProblem
from getp.files import STDIO, check_writable, write_report


def run(settings: Settings) -> int:
    """Compare the files; return the exit status. Raises GetpError."""
    source = loading.needed(settings, settings.prompt.input, "-i/--input FILE")
    options, report = settings.result_file, settings.job.report
    if options.reference is None and options.expected is None:
        raise UsageProblem("mode eval needs --reference FILE or --expected FILE")
    loading.check_agreement(settings)
    loading.check_json_report(settings)
    from getp.text.evaluate import check_agreement, evaluate

    if report is not None:
        files = {"input": source, "reference": options.reference, "expected": options.expected}
        check_writable(report, "report", {role: path for role, path in files.items() if path})
    outcome = evaluate(
        source,
        options.reference,
        options.expected,
        lambda: loading.load_tokenizer(settings),
        to_stderr=report == STDIO,
    )
    if report is not None:
        write_report(report, outcome)
    check_agreement(outcome.get("reference"), options.require_agreement)
    return 0
