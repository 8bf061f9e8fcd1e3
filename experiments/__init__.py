"""Drivers: flags to one frozen config, a run in a work directory, its report. Run from a checkout, never installed.

    python -m experiments.DRIVER --config=configs/DRIVER.py:VARIANT --workdir=DIR [--mode=run|eval]

common            what all drivers share: models, data, training, reports, and the runner
cnn               image classifiers under any constraint
sweep             methods or constraint families against rate or bytes
crossbar          FORMS and SOT-MRAM: accuracy, speed, area and power on simulated engines
gru_speech        RTMobile: block-pruned GRU, phone or word error rate, streaming
language_model    DARB: LSTM language models at equal measured rates
pneumonia         YOLOv3 of 107 blocks, pruned and physically compacted
federated         ESMFL: sparse encrypted updates, attested aggregator (simulated)
entity_linking    DCA: one-pass collective entity linking
template          the smallest driver, to be copied

A driver's package has the same files in the same roles: `__main__` starts it, `config` says what an experiment is,
`task` is what is trained, `measures` what is measured, `page` its sections of the report.
"""
