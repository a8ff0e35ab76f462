"""What tests of several folders use: factories of adapters, servers, stub engines, and checks of answers."""
