"""The report: one page and one CSV from scores, responses and the judges' own measurements. Reads tables only."""
