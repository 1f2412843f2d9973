"""What watches a run: status, monitor, plots and reports.

Reads the files of a run folder and writes only to its `monitor/` and `reports/`; torch is never imported, so an
observer starts at once and cannot harm a run. Nothing is imported here, to keep `status` quick.
"""
