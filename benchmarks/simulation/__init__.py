"""A deterministic simulation of the service: the real ledger, replica and client in virtual time, under faults.

One event loop with a clock that jumps runs everything, so a history is a function of its seed, takes a millisecond or
two, and can be replayed (``python -m benchmarks.simulation --seed N --trace``). Nothing here starts Ray or a thread.

The real parts are :class:`~simulator.service.ledger.Ledger` over a simulated disk, the methods of
:class:`actors.replica.Replica` with its teller and its fair queue, :class:`~simulator.service.visit.Visit`, the checks
of :class:`~simulator.service.victim.VictimService`, the chunks and keys of
:class:`~simulator.service.oracle.ServiceOracle`, and the retry rule of :class:`actors.conversation.Conversation`.
Simulated are the disk, the network, the deaths, and the model's answer.
"""
