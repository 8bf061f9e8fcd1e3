"""Speech: from sound files to error rates, around a recurrent network that streams.

audio       WAV and SPHERE files
corpora     corpora by name: tones (generated), fsdd, timit_sample, timit
features    MFCC or filterbanks with derivatives, normalised per speaker
phones      TIMIT's 61, 48 and 39 phones
augment     recordings at other speeds
batches     padding, buckets of like lengths, order of training
tasks       what is learned: a unit a frame, or CTC
decode      bigram, Viterbi, CTC prefix beam search
errors      substitutions, deletions, insertions; confusions
rates       what each matrix keeps at an overall rate; BSP and what it is compared with
reference   a plain recogniser to compare with: Gaussian hidden Markov models
streaming   chunks, carried state, stored matrices; latency, real-time factor, energy
"""

from experiments.gru_speech.speech import audio as audio
from experiments.gru_speech.speech import augment as augment
from experiments.gru_speech.speech import batches as batches
from experiments.gru_speech.speech import corpora as corpora
from experiments.gru_speech.speech import decode as decode
from experiments.gru_speech.speech import errors as errors
from experiments.gru_speech.speech import features as features
from experiments.gru_speech.speech import phones as phones
from experiments.gru_speech.speech import rates as rates
from experiments.gru_speech.speech import reference as reference
from experiments.gru_speech.speech import streaming as streaming
from experiments.gru_speech.speech import tasks as tasks
from experiments.gru_speech.speech.corpus import Corpus as Corpus
from experiments.gru_speech.speech.corpus import Utterance as Utterance
from experiments.gru_speech.speech.features import FrontEnd as FrontEnd
