"""What runs inside the enclave: NumPy and cryptography only; nothing here imports from outside this folder.

messages     sparse and dense messages, written small and parsed without trust
oblivious    adding a sparse layer with accesses that do not depend on it
rounds       which messages a round takes, how they are averaged, when the model is pruned
sessions     hello, offer, sealed frames
quotes       SGX quotes: structure, signature chain, policy
attest       attesters and verifiers, Gramine's and simulated
sealing      sealed records, the counter
aggregator   the aggregator
main         its process
refused      the error for everything that is not accepted
"""
