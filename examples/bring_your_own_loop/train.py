"""A plain PyTorch loop at several sites: `mpiexec -n 4 python train.py`.

What privfl needs is marked; without it this trains on one's own digits.
"""
import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import privfl  # <- 1

EPOCHS = 10
comm = MPI.COMM_WORLD

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
mine = torch.arange(1500) % comm.size == comm.rank  # this site's records; the others never see them
loader = DataLoader(TensorDataset(x[:1500][mine], y[:1500][mine]), batch_size=64)

torch.manual_seed(0)  # all sites start from the same model
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.5)
criterion = torch.nn.CrossEntropyLoss()

site = f"site{comm.rank}"
engine = privfl.PrivacyEngine(site=site, comm=comm, ledger=f"{site}.ledger")  # <- 2
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model, optimizer=optimizer, data_loader=loader,
    target_epsilon=2.0, target_delta=1e-4, epochs=EPOCHS, max_grad_norm=0.5)

for _ in range(EPOCHS):
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()  # now a secure sum over all sites

with torch.no_grad():
    accuracy = (model(x[1500:]).argmax(dim=1) == y[1500:]).float().mean().item()
epsilon = engine.get_epsilon(1e-4)
print(f"site {comm.rank}: accuracy {accuracy:.4f}, epsilon {epsilon:.4f}", flush=True)
