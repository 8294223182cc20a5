"""Recovery: how a converted student gets back what its new attention lost, by transfer from its teacher."""
