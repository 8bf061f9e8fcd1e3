"""Collective entity linking with dynamic context augmentation (DCA), its baselines, its data and its measures.

corpus         documents, mentions, candidates; priors, coreference, orders
readers        files of entity linking, checked
world          a generated world that needs no data
vectors        entity vectors from links, word vectors from entities
knowledge      what is known of entities and words, as arrays
mention_types  types of mentions where no tagger's are at hand
files          all of that by name: `CORPORA`
encode         documents to rows of slots; pruning of candidates
attention      fit of candidates to a set of vectors
model          the linker: `rollout` (the scan) and `path_scores` (all mentions together)
belief         the global baseline: loopy belief propagation over all pairs
learning       multi-margin with teacher forcing or scheduled sampling, REINFORCE; the training's task
metrics        in-KB accuracy, micro F1, kinds of errors
page           linked documents for people
"""

from experiments.entity_linking.linking.corpus import Candidate as Candidate
from experiments.entity_linking.linking.corpus import Document as Document
from experiments.entity_linking.linking.corpus import Mention as Mention
from experiments.entity_linking.linking.encode import Encoded as Encoded
from experiments.entity_linking.linking.files import CORPORA as CORPORA
from experiments.entity_linking.linking.files import Corpora as Corpora
from experiments.entity_linking.linking.knowledge import Knowledge as Knowledge
from experiments.entity_linking.linking.learning import Learning as Learning
from experiments.entity_linking.linking.learning import decide as decide
from experiments.entity_linking.linking.learning import make_task as make_task
from experiments.entity_linking.linking.model import Linker as Linker
from experiments.entity_linking.linking.model import facts_of as facts_of
from experiments.entity_linking.linking.model import init as init
from experiments.entity_linking.linking.model import path_scores as path_scores
from experiments.entity_linking.linking.model import rollout as rollout
