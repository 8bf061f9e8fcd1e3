"""Drivers: flags to one frozen config, a run, and its report. No maths here."""
