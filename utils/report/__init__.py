"""From `results/` to tables, figures and one page: `python -m utils.report RUNS --html report.html`.

    runs.py        folders of runs, or an export, -> `SeedRun`; seeds of the same thing -> `Cell`; all -> a frame
    protocols.py   which evaluation of a run is reported: last, mean of the last, best, offline-selected
    statistics.py  interquartile mean and stratified bootstrap, as rliable defines them; Student's t
    names.py       short names that tell cells apart
    compare.py     cells side by side: scores, the settings that differ, paired differences
    tables.py      cells -> tables, as Markdown, CSV and LaTeX
    figures.py     cells -> learning curves, performance profiles, lambda and the KL term
    page.py        everything in one HTML file, by page.html
    build.py       all of it for some folders, and the files it is written to
    export.py      runs -> the two files worth keeping beside a published number

Nothing but the files that a run leaves is read; nothing is trained or evaluated here.
"""
