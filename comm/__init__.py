"""Communicators and channels between ranks, rendezvous and the ledger of every transfer."""
