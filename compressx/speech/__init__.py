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

from compressx.speech import audio as audio
from compressx.speech import augment as augment
from compressx.speech import batches as batches
from compressx.speech import corpora as corpora
from compressx.speech import decode as decode
from compressx.speech import errors as errors
from compressx.speech import features as features
from compressx.speech import phones as phones
from compressx.speech import rates as rates
from compressx.speech import reference as reference
from compressx.speech import streaming as streaming
from compressx.speech import tasks as tasks
from compressx.speech.corpus import Corpus as Corpus
from compressx.speech.corpus import Utterance as Utterance
from compressx.speech.features import FrontEnd as FrontEnd
