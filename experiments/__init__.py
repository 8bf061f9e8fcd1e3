"""Drivers: flags -> one frozen config -> a run in a work directory -> its report.

python -m experiments.<driver> --config=configs/<driver>.py:<variant> --workdir=DIR [--mode=run|eval]

driver       what all drivers share: flags, the work directory, errors in one line
cnn          image classifiers compressed by ADMM
"""
