// Threads that are kept: waking one costs less than starting one.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace hosfl {

// Of a process by its line of /proc/<pid>/stat: whether it was forked and runs on without a program of its own. Also
// where nothing tells: no such line, or no flag at all, as always in a gVisor sandbox, and elsewhere where addresses
// are not random. What was not forked then has threads of our own, slower right after an op of torch, whose threads
// still spin. The other mistake is a child that waits for ever.
inline bool forked(const std::string& stat) {
  constexpr unsigned FORKED = 0x40;  // PF_FORKNOEXEC of Linux, a flag of the ninth field
  const size_t name = stat.rfind(')');  // the second field is in brackets, and may hold more of them
  unsigned flags = 0;
  if (name != std::string::npos) sscanf(stat.c_str() + name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags);
  return flags == 0 || flags & FORKED;
}

// Never destroyed: its threads wait until the process ends. A forked child has none of them, and begins with a new
// pool.
class Pool {
 public:
  static Pool& here() {
    static const int forks = pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
    (void)forks;
    return *current();
  }

  // From now on `run` takes OpenMP's threads, if the process has loaded an OpenMP for all to see, as torch does on
  // Linux (LLVM's has the same function). After each op those wait for the next one by spinning, and threads of our own
  // would share the processors with them. Not in a forked child: OpenMP's are gone there, it does not know, and waits
  // for them for ever.
  bool join_openmp() {
    if (!forked_here()) openmp_ = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return openmp_ != nullptr;
  }

  // Calls `job` on this thread, and meanwhile on up to `others` of the pool's. Returns when nobody is at it any more:
  // who has not begun by the time that this thread's call ends never does. While another thread uses the pool, and
  // where the system starts no more threads, those that are there do all the work. OpenMP's come all, however many
  // `others` are: it would end those that one call leaves out, and start them again for the next.
  void run(int others, const std::function<void()>& job) {
    if (others < 1) return job();
    if (const Region region = openmp_) {
      auto call = [](void* data) { (*static_cast<const std::function<void()>*>(data))(); };
      return region(call, const_cast<std::function<void()>*>(&job), 0, 0);
    }
    std::unique_lock<std::mutex> mine(turn_, std::defer_lock);
    if (!mine.try_lock()) return job();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(others);
      job_ = &job;
      open_ = std::min(others, threads_);
    }
    wake_.notify_all();
    job();
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  // How a compiler calls OpenMP: the work, its data, the number of threads (0: as many as are set), flags.
  using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

  static bool forked_here() {
    std::ifstream file("/proc/self/stat");
    std::string line;
    std::getline(file, line);
    return forked(line);
  }

  static Pool*& current() {
    static Pool* pool = new Pool;
    return pool;
  }

  void start(int count) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
      for (; threads_ < count; ++threads_) std::thread([this] { wait(); }).detach();
    } catch (const std::exception&) {  // no more threads, or no memory for one
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_ > 0; });
      --open_, ++busy_;
      const std::function<void()>& job = *job_;
      lock.unlock();
      job();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::atomic<Region> openmp_{nullptr};
  std::mutex turn_;   // held while somebody uses the pool
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  const std::function<void()>* job_ = nullptr;
  int threads_ = 0, open_ = 0, busy_ = 0;  // that there are; that may still begin; that are at it
};

}  // namespace hosfl
