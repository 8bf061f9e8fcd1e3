"""Federated learning with sparse, encrypted updates and an attested aggregator.

splits      how examples are divided among clients
algorithm   what a client does in a round: the one definition behind both engines
simulate    hundreds of clients in one jitted program, with exact bytes
client      a client: attestation, training, packing, sealing, crash recovery
host        the untrusted host: the enclave's process, rounds without a network
flower      Flower's gRPC server and clients over TLS (extra `federated`)
trusted     what runs inside the enclave; NumPy and cryptography only
secagg      masking without an enclave, for contrast
timing      elapsed time under a stated network
tls         certificates for a server
gramine     manifest template and steps for SGX

All but `splits` need the extra `federated`: pip install 'compressx[federated]'. Nothing is imported here, so that each
part loads only what it needs.
"""
