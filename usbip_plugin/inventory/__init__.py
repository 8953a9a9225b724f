"""What each resource advertises, and why: pure functions from what is known to what the kubelet is told.

facts says what is known, members which devices that makes, reasons why each can or cannot be had, bearers who has a
serial number that is promised, lists what the kubelet is told. Besides: annotations, what a lock says of its device;
search, where a lost device may be; preference, which device a node reaches for first.
"""
