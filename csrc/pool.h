// Threads that are kept: waking one costs less than starting one.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace hosfl {

// Never destroyed: its threads wait until the process ends. A forked child has none of them, and begins with a new pool.
class Pool {
 public:
  static Pool& here() {
    static const int forks = pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
    (void)forks;
    return *current();
  }

  // Calls `job` on this thread, and meanwhile on up to `others` of the pool's. Returns when nobody is at it any more: who
  // has not begun by the time that this thread's call ends never does. While another thread uses the pool, and where the
  // system starts no more threads, those that are there do all the work.
  void run(int others, const std::function<void()>& job) {
    std::unique_lock<std::mutex> mine(turn_, std::defer_lock);
    if (others < 1 || !mine.try_lock()) return job();
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

  std::mutex turn_;   // held while somebody uses the pool
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  const std::function<void()>* job_ = nullptr;
  int threads_ = 0, open_ = 0, busy_ = 0;  // that there are; that may still begin; that are at it
};

}  // namespace hosfl
