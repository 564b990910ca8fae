"""What all operators share: their declaration, checks of arguments, facts about tracing, launches and costs."""
