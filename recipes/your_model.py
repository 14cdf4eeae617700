"""The shortest useful pruning step: remove blocks from a network of yours inside a training loop of yours."""

import torch
import torchvision

import modprune

# Your network, data, optimizer and schedule.
model = torchvision.models.resnet18(num_classes=4)
images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 4
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
PRUNE_AT = 2

for epoch in range(4):
    if epoch == PRUNE_AT:  # the lines to add
        criterion = modprune.criteria.Modularity(samples=64)
        pruner = modprune.ModularityPruner(model, images[:1], loader, criterion, blocks=2)
        with modprune.carry_over(model, optimizer):  # momentum and schedule go on with what stays
            pruner.step()
        print("removed", ", ".join(pruner.plan().remove))
    model.train()
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, {sum(p.numel() for p in model.parameters()):,} parameters")

modprune.save(model, "pruned.safetensors")
