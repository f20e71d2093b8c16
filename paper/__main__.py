"""Tests the paper's claims, one script each, and writes RESULTS.md with the ledger of the claims.

python -m paper                       all of them
python -m paper parity --seeds 10     some of them; the results of the others are kept
python -m paper --quick               a rough look, written to out/paper
python -m paper.parity                one, which also prints its table
"""

from collections import Counter

from paper import experiment


def main(argv: list[str] | None = None) -> None:
    args = experiment.parse_args(argv, __doc__, names=True)
    folder = experiment.OUT if args.quick else experiment.HERE
    names = args.scripts or experiment.SCRIPTS
    if args.page:
        experiment.write_page(folder, names)
        return
    setting = experiment.setting_of(args)
    for name in names:
        print(f"{name:18}", end="", flush=True)
        entry = experiment.run(name, setting)
        experiment.save(name, entry, folder)
        findings = experiment.script(name).findings(entry["results"])
        verdicts = Counter(finding.verdict for finding in findings)
        summary = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        print(f"{entry['seconds']:6.0f} s   {summary}", flush=True)
    print(f"wrote {folder / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
