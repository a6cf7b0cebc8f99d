"""The product on a device: each test runs on the CPU too, so that none is first read on a card."""
