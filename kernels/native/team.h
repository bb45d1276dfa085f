// Threads that run one function together and meet at barriers.

#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct Team Team;

struct Team {
  int32_t threads, stop;
  _Atomic int32_t arrived, phase, asleep;
  void (*run)(Team *team, int thread, const void *job);
  const void *job;
  pthread_t *workers;
};

// Waits in the kernel after a short spin: a thread that spins takes the core that another one needs.
static void barrier(Team *team) {
  if (team->threads == 1) return;
  int32_t phase = atomic_load(&team->phase);
  if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
    atomic_store(&team->arrived, 0);
    atomic_fetch_add(&team->phase, 1);
    if (atomic_load(&team->asleep)) syscall(SYS_futex, &team->phase, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    return;
  }
  for (int spin = 0; spin < 400; spin++) {
    if (atomic_load(&team->phase) != phase) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  atomic_fetch_add(&team->asleep, 1);
  while (atomic_load(&team->phase) == phase) syscall(SYS_futex, &team->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
  atomic_fetch_sub(&team->asleep, 1);
}

typedef struct { int first, last; } Share;

static inline Share share(int count, int thread, int threads) {
  return (Share){(int)((int64_t)count * thread / threads), (int)((int64_t)count * (thread + 1) / threads)};
}

typedef struct { Team *team; int thread; } Worker;

static void *work(void *argument) {
  Worker worker = *(Worker *)argument;
  free(argument);
  for (;;) {
    barrier(worker.team);
    if (worker.team->stop) return NULL;
    worker.team->run(worker.team, worker.thread, worker.team->job);
    barrier(worker.team);
  }
}

// Runs a job on all threads, of which the caller is one.
static void run_together(Team *team, void (*run)(Team *, int, const void *), const void *job) {
  team->run = run, team->job = job;
  barrier(team);
  run(team, 0, job);
  barrier(team);
}

static void end_team(Team *team) {
  team->stop = 1;
  barrier(team);
  for (int thread = 1; thread < team->threads; thread++) pthread_join(team->workers[thread], NULL);
  free(team->workers);
  free(team);
}

// A team of threads; fewer than asked for if the system starts no more.
static Team *start_team(int threads) {
  Team *team = calloc(1, sizeof(Team));
  team->workers = calloc(threads, sizeof(pthread_t));
  team->threads = threads;
  for (int thread = 1; thread < threads; thread++) {
    Worker *worker = malloc(sizeof(Worker));
    *worker = (Worker){team, thread};
    if (pthread_create(&team->workers[thread], NULL, work, worker)) {
      free(worker);
      team->threads = thread;  // those that wait at the barrier are too few for either number
      break;
    }
  }
  return team;
}
