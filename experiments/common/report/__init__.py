"""Reports: what a run writes down, draws and shows. Every driver uses the same pieces.

While it runs
  metrics       `metrics.jsonl`: `MetricsWriter`, `read_metrics`, curves and phases out of it
When it ends
  summary       `summary.json`: `make_summary`, `write_summary`, `read_summary`, one schema for every driver
  environment   command, date, machine and versions: `run_record`
  layers        `Layer`, a row of the per-layer table
  run           `standard_pictures`: the plots every run has, drawn from its metrics and weights
  html          `Page`, `write_report`: one self-contained page, with a driver's own sections
  console       `print_report`: the same on the console
Plots
  plots         curves over steps, residuals, rho, metric against compression, bars
  weight_plots  histograms, kept weights, masks
  pattern_plots the masks of a pattern library
  style         the common look
Tables
  tables        `python -m experiments.common.report.tables`: README's tables from every kept summary
  declared      how a table is declared
Shared
  headline      the figures one looks at first, in words
  format        how numbers are written
  markdown      safe markdown, blocks between markers
"""
