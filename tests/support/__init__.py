"""What tests stand on: small models, files made for tests, other processes, and a Hub on the loopback interface."""
