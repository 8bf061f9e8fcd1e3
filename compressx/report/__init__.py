"""Reports: metrics, summaries, plots, one HTML page per run, tables and console output.

metrics      `metrics.jsonl`: writer, reader, curves and phases
summary      `summary.json`: the schema, checked both ways
"""
